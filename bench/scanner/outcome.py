"""What a scanner brought to guests, held against nobody and against ksmd."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from bench.scanner import savings
from bench.scanner.guests import Case
from bench.scanner.recording import Look, Record
from bench.scanner.savings import Course
from bench.scanner.scanners import NOTHING, WIDE_OPEN

NEARLY = 0.9  # of the final saving
BY = ("machine", "programs")


class Outcome(msgspec.Struct, frozen=True):
    """The figures of one case. None: never, or there is nothing to divide by."""

    saved_bytes: int  # at the end, by the kernel's word for the whole machine
    saved_programs_bytes: int  # the same, of the programs and the scanner alone
    cpu_seconds: float
    cpu_seconds_per_gib: float | None
    nearly_seconds: float | None  # until 90 % of the final saving was there to stay
    nearly_after_work_seconds: float | None  # the same, from when all work was done
    nearly_cpu_seconds: float | None
    wide_open_seconds: float | None  # until 90 % of what ksmd saves wide open
    wide_open_cpu_seconds: float | None
    to_wide_open_ratio: float | None  # of the final savings
    slow_down: float  # of the guests' work; 0.1 is 10 % more time


def column(looks: Sequence[Look], name: str) -> Course:
    """Give a figure of all looks."""
    return np.array([getattr(look, name) for look in looks], dtype=float)


def without(case: Record, nothing: Record, by: str) -> Course:
    """Say what was in use with `nothing` when it was as far as `case` at each look."""
    seconds = column(case.looks, "seconds")
    there = savings.aligned(seconds, case.marks, nothing.marks)
    then, course = (column(nothing.looks, name) for name in ("seconds", f"{by}_bytes"))
    found: Course = np.interp(there, then, course)
    return found


def saved(case: Record, nothing: Record, by: str) -> Course:
    """Say how much less was in use at each look than with `nothing`."""
    used = column(case.looks, f"{by}_bytes")
    return savings.smooth(without(case, nothing, by) - used)


def outcomes(cases: Sequence[Case], by: str) -> dict[str, Outcome]:
    """Give the figures of all cases that were measured; none without `nothing`."""
    done = {case.name: case for case in cases if case.done}
    nothing = done.get(NOTHING)
    if nothing is None:
        return {}
    wide_open = _final(done[WIDE_OPEN], nothing, by) if WIDE_OPEN in done else None
    return {name: _outcome(case, nothing, wide_open, by) for name, case in done.items()}


def _outcome(case: Case, nothing: Case, wide_open: float | None, by: str) -> Outcome:
    final = _final(case, nothing, by)
    nearly, nearly_cpu = _nearly(case, nothing, final, by)
    as_wide, as_wide_cpu = _nearly(case, nothing, wide_open, by)
    cpu = case.looks[-1].cpu_seconds
    return Outcome(
        saved_bytes=int(_final(case, nothing, "machine")),
        saved_programs_bytes=int(_final(case, nothing, "programs")),
        cpu_seconds=cpu,
        cpu_seconds_per_gib=cpu / (final / 2**30) if final > 0 else None,
        nearly_seconds=nearly,
        nearly_after_work_seconds=_after_work(case, nearly),
        nearly_cpu_seconds=nearly_cpu,
        wide_open_seconds=as_wide,
        wide_open_cpu_seconds=as_wide_cpu,
        to_wide_open_ratio=final / wide_open if wide_open else None,
        slow_down=case.work_seconds / nothing.work_seconds - 1,
    )


def _final(case: Case, nothing: Case, by: str) -> float:
    return savings.final(column(case.looks, "seconds"), saved(case, nothing, by))


def _nearly(
    case: Case, nothing: Case, final: float | None, by: str
) -> tuple[float | None, float | None]:
    """Say when nearly `final` was saved, and how much processor time it took."""
    if case is nothing or final is None or final <= 0:
        return None, None
    seconds = column(case.looks, "seconds")
    when = savings.time_to(seconds, saved(case, nothing, by), NEARLY * final)
    if when is None:
        return None, None
    used = np.interp(when, seconds, column(case.looks, "cpu_seconds"))
    return when, float(used)


def _after_work(case: Case, when: float | None) -> float | None:
    return None if when is None else when - case.worked_seconds[-1]
