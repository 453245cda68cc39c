"""Figures of a scanner that nobody ran."""

from sksm.scanner.figures import Figures, ProcessFigures, Refusal

_NOTHING = Figures(
    epoch=1,
    seconds=1.0,
    pause_seconds=1.0,
    cpu_seconds=0.5,
    looking_seconds=0.1,
    read_bytes=0,
    watched_bytes=8 << 20,
    merged_bytes=4 << 20,
    unmerged_pages=0,
    pool_bytes=1 << 20,
    own_bytes=1 << 20,
    saved_net_bytes=2 << 20,
    stops=0,
    stopped_p99_seconds=0.0,
    stopped_max_seconds=0.0,
    stopped_seconds=[],
    processes=[],
    refused=[],
)


def figures(**changes):
    """Give figures that differ from some others by `changes`."""
    fields = {name: getattr(_NOTHING, name) for name in _NOTHING.__slots__}
    return Figures(**{**fields, **changes})


def process(pid, name="program"):
    return ProcessFigures(pid, name, 0, 0, 0, 0, 0, 0)


def refusal(pid, reason, name="program"):
    return Refusal(pid, name, reason)
