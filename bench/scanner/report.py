"""What came out for guests: a table, and sentences about the goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.table import Table

from bench.scanner.guests import Case
from bench.scanner.outcome import Outcome
from bench.scanner.scanners import NOTHING, SKSM, WIDE_OPEN
from sksm.reporters import tables

_MIB = 2.0**20
_SAVED_GOAL = 0.95  # of what ksmd saves wide open
_CPU_GOAL = 0.1  # of its processor time for each GiB


def number(value: float | None, digits: int = 1) -> str:
    """Write a figure that may not be there."""
    return "-" if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    """Write a part of a whole that may not be there."""
    return "-" if value is None else f"{value:.1%}"


_ROWS: list[tuple[str, Callable[[Outcome], str]]] = [
    ("saved, MiB", lambda one: number(one.saved_bytes / _MIB)),
    (
        "  PSS of guests and scanner",
        lambda one: number(one.saved_programs_bytes / _MIB),
    ),
    ("  of wide open's", lambda one: share(one.to_wide_open_ratio)),
    ("90 % of it, s", lambda one: number(one.nearly_seconds)),
    ("  after the last work, s", lambda one: number(one.nearly_after_work_seconds)),
    ("  CPU until then, s", lambda one: number(one.nearly_cpu_seconds, 2)),
    ("90 % of wide open's, s", lambda one: number(one.wide_open_seconds)),
    ("  CPU until then, s", lambda one: number(one.wide_open_cpu_seconds, 2)),
    ("CPU in all, s", lambda one: number(one.cpu_seconds, 2)),
    ("  for each GiB saved, s", lambda one: number(one.cpu_seconds_per_gib, 2)),
    ("guests work longer by", lambda one: share(one.slow_down)),
]


def table(cases: Sequence[Case], found: dict[str, Outcome], by: str) -> Table:
    """Draw all cases, a column each."""
    title = f"{len(cases)} cases; savings and times by memory of the {by}"
    shown = [case for case in cases if case.name in found]
    names = (case.name.replace("_", " ") for case in shown)
    drawn = tables.ruled("", *(f">{name}" for name in names), title=title)
    in_use = [number(case.looks[-1].machine_bytes / _MIB) for case in shown]
    drawn.add_row("in use at the end, MiB", *in_use)
    for label, cell in _ROWS:
        cells = (
            "" if case.name == NOTHING else cell(found[case.name]) for case in shown
        )
        drawn.add_row(label, *cells)
    drawn.add_row("the guests' work, s", *(number(case.work_seconds) for case in shown))
    drawn.add_row("script, s", *(number(case.marks[-1]) for case in shown))
    return drawn


def remarks(cases: Sequence[Case], found: dict[str, Outcome]) -> Iterator[str]:
    """Say what is not in the table, and how far the goals are."""
    for case in cases:
        if case.skipped:
            yield f"{case.name} is left out: {case.skipped}"
        if case.failed:
            yield f"{case.name} failed: {case.failed}"
    if {SKSM, WIDE_OPEN} <= found.keys():
        yield from _goals(found[SKSM], found[WIDE_OPEN])


def _goals(ours: Outcome, theirs: Outcome) -> Iterator[str]:
    ratio = ours.to_wide_open_ratio or 0.0
    yield f"sksm saves {ratio:.1%} of what ksmd does (goal: {_SAVED_GOAL:.0%} or more)"
    if ours.cpu_seconds_per_gib and theirs.cpu_seconds_per_gib:
        ratio = ours.cpu_seconds_per_gib / theirs.cpu_seconds_per_gib
        yield (
            f"sksm takes {ratio:.1%} of ksmd's CPU for each GiB saved "
            f"(goal: {_CPU_GOAL:.0%} or less)"
        )
    if ours.wide_open_seconds is None or theirs.wide_open_seconds is None:
        yield "sksm never saves 90 % of what ksmd does (goal: no later than ksmd)"
    else:
        late = ours.wide_open_seconds - theirs.wide_open_seconds
        when = f"{abs(late):.1f} s {'later' if late > 0 else 'earlier'} than ksmd"
        yield f"sksm saves 90 % of what ksmd does {when} (goal: no later)"
