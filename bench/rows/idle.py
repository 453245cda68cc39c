"""What the scanner takes where nothing happens."""

from __future__ import annotations

import contextlib

from bench import daemon, target
from bench.results import Goal, Measure, Options, Row, Wrong
from sksm.linux.features import Feature, missing
from sksm.scanner.figures import Ledger
from sksm.scanner.scanner import Scanner, Target
from sksm.spans import PAGE_SIZE

_GIB = 1 << 30
_QUIET_SECONDS = 2.0
_EPOCHS = 20  # a round
_MOST_EPOCHS = 30  # until all is read
_GOAL = Goal(at_most=0.020)


def measure(options: Options) -> Row:
    """Time epochs over a process of 1 GiB that only sleeps, all of it known."""
    row = Row()
    if reason := missing(Feature.USERFAULTFD_WP_ASYNC):
        row.skipped = reason
        return row
    now = 0.0
    with (
        daemon.own(),
        target.running(0, 1, 1, _GIB) as process,
        contextlib.closing(
            Scanner(lambda: {process.pid: Target()}, _QUIET_SECONDS, lambda: now)
        ) as scanner,
    ):
        process.buffer()
        used = Ledger(scanner).cpu_seconds
        read = 0
        for _ in range(_MOST_EPOCHS):
            read += scanner.epoch().read_pages
            now += 1.0
        if read * PAGE_SIZE < _GIB:
            raise Wrong(f"only {read} pages were read")
        epochs = []
        for _ in range(options.rounds):
            before = used()
            for _ in range(_EPOCHS):
                scanner.epoch()
                now += 1.0
            epochs.append((used() - before) / _EPOCHS)
        (group,) = scanner.groups.values()
        (member,) = group.members.values()
        kept = member.pages.nbytes / member.pages.seen()
    row.measures += [
        Measure("idle_epoch_cpu_seconds", "CPU an epoch, 1 GiB idle", epochs, _GOAL),
        Measure("kept_bytes_per_page", "kept of a page", [kept], Goal(at_most=16)),
    ]
    return row
