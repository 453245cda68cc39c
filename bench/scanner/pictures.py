"""What an experiment shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.scanner import outcome, plotting
from bench.scanner.guests import Case
from bench.scanner.pairs import Run
from bench.scanner.plotting import Panel
from bench.scanner.scanners import NOTHING

_MIB = 2.0**20
_COST = "CPU time of the scanner, s"


def draw_guests(cases: Sequence[Case], by: str, path: Path) -> None:
    """Draw what each scanner saved, and what it cost."""
    found = outcome.outcomes(cases, by)
    done = {case.name: case for case in cases if case.name in found}
    saved, cost = {}, {}
    for name, case in done.items():
        if name != NOTHING:
            seconds = outcome.column(case.looks, "seconds")
            memory = outcome.saved(case, done[NOTHING], by)
            saved[name] = (seconds, memory / _MIB)
            cost[name] = (seconds, outcome.column(case.looks, "cpu_seconds"))
    panels = [Panel("memory saved, MiB", saved), Panel(_COST, cost)]
    plotting.draw("virtual machines that boot, work and rest", panels, path)


def draw_pair(title: str, runs: Sequence[Run], by: str, path: Path) -> None:
    """Draw what was in use without and with a scanner, and what that cost."""
    memory, cost = {}, {}
    for run in runs:
        if run.done:
            seconds = outcome.column(run.looks, "seconds")
            used = outcome.column(run.looks, f"{by}_bytes")
            memory[run.name] = (seconds, used / _MIB)
            cost[run.name] = (seconds, outcome.column(run.looks, "cpu_seconds"))
    panels = [Panel("net memory in use, MiB", memory), Panel(_COST, cost)]
    plotting.draw(title, panels, path)
