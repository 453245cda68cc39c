"""What came out where the same programs ran without a scanner and with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
from rich.table import Table

from bench.programs.load import Phase
from bench.scanner import outcome, savings
from bench.scanner.outcome import NEARLY
from bench.scanner.pairs import WITHOUT, Run
from bench.scanner.report import number, share
from sksm.reporters import tables

_MIB = 2.0**20


class Effect(msgspec.Struct, frozen=True):
    """What the scanner brought, by one way to count memory."""

    without_bytes: int  # on average
    with_bytes: int
    worst_loss: float  # a part of what is in use without; negative: a gain
    mean_loss: float
    final_saved_bytes: int
    nearly_seconds: float | None  # until 90 % of that was there to stay


def effects(runs: Sequence[Run]) -> dict[str, Effect]:
    """Hold the run with a scanner against the one without, by each way to count."""
    without, with_ = runs
    if not (without.done and with_.done):
        return {}
    return {by: _effect(without, with_, by) for by in outcome.BY}


def _effect(without: Run, with_: Run, by: str) -> Effect:
    seconds = outcome.column(with_.looks, "seconds")
    course = outcome.column(with_.looks, f"{by}_bytes")
    before = outcome.without(with_, without, by)
    saved = outcome.saved(with_, without, by)
    worst, mean = savings.losses(course, before)
    final = savings.final(seconds, saved)
    nearly = savings.time_to(seconds, saved, NEARLY * final) if final > 0 else None
    used = int(before.mean()), int(course.mean())
    return Effect(*used, worst, mean, int(final), nearly)


_ROWS: list[tuple[str, Callable[[Effect], str]]] = [
    ("without scanner, mean, MiB", lambda one: number(one.without_bytes / _MIB)),
    ("with it, mean, MiB", lambda one: number(one.with_bytes / _MIB)),
    ("  net loss, worst", lambda one: share(one.worst_loss)),
    ("  net loss, mean", lambda one: share(one.mean_loss)),
    ("saved at the end, MiB", lambda one: number(one.final_saved_bytes / _MIB)),
    ("  90 % of it, s", lambda one: number(one.nearly_seconds)),
]


def table(title: str, found: dict[str, Effect]) -> Table:
    """Draw the effect, by each way to count memory."""
    drawn = tables.ruled("net memory", *(f">of the {by}" for by in found), title=title)
    for label, cell in _ROWS:
        drawn.add_row(label, *(cell(one) for one in found.values()))
    return drawn


def remarks(runs: Sequence[Run]) -> Iterator[str]:
    """Say what else there is to say of each run."""
    for run in runs:
        if run.skipped:
            yield f"{run.name} is left out: {run.skipped}"
        if run.failed:
            yield f"{run.name} failed: {run.failed}"
        if run.phase:
            yield f"{run.name}: {_answers(run.phase)}"
        if run.done and run.name != WITHOUT:
            yield f"{run.name}: {number(run.looks[-1].cpu_seconds, 2)} s of CPU time"
        if run.epochs:
            yield f"{run.name}: it says at last {run.epochs[-1]}"


def _answers(phase: Phase) -> str:
    p50, p99 = (1000 * one for one in (phase.p50_seconds, phase.p99_seconds))
    rate = f"{phase.answers_per_second:.1f} requests a second"
    return f"{rate}, p50 {p50:.2f} ms, p99 {p99:.2f} ms"
