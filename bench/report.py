"""The results, as a table for people and as JSON for programs."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from bench import memory
from bench.results import SCHEMA, Measure, Options, Row
from sksm.reporters import tables

# By the end of a measure's name: the unit shown, and its size in the name's own.
UNITS = {
    "_bytes_per_second": ("GiB/s", 2.0**30),
    "_bytes_per_page": ("B", 1.0),
    "_bytes": ("MiB", 2.0**20),
    "_seconds": ("s", 1.0),
    "_share": ("%", 0.01),
    "_ratio": ("x", 1.0),
}


def as_dict(rows: list[Row], options: Options, seconds: float) -> dict[str, Any]:
    """Give the whole run the names that `--json` promises."""
    return {
        "schema": SCHEMA,
        "sksm": metadata.version("sksm"),
        "machine": machine(),
        "rounds": options.rounds,
        "size_bytes": options.size_bytes,
        "seconds": seconds,
        "rows": [row.as_dict() for row in rows],
    }


def machine() -> dict[str, Any]:
    """Say what the figures were measured on."""
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "huge_pages": memory.huge_pages_setting(),
        "load_1_minute": os.getloadavg()[0],
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def table(rows: list[Row], options: Options) -> Table:
    """Draw all rows: each measure with its spread over the rounds and its goal."""
    size = options.size_bytes >> 20
    title = f"{options.rounds} rounds of {size} MiB"
    figures = (">min", ">median", ">max", ">goal")
    drawn = tables.ruled("measure", "unit", *figures, "", title=title)
    for row in rows:
        drawn.add_row(f"[bold]{row.title}[/bold]")
        for measure in row.measures:
            drawn.add_row(*_cells(measure))
        if row.skipped or row.failed:
            drawn.add_row("  skipped" if row.skipped else "  [red]failed[/red]")
        drawn.add_section()
    return drawn


def remarks(rows: list[Row]) -> list[str]:
    """List what there is to say beside the figures, why some are missing first."""
    said = [f"{row.title} failed: {row.failed}" for row in rows if row.failed]
    said += [f"{row.title} skipped: {row.skipped}" for row in rows if row.skipped]
    return said + [f"{row.title}: {note}" for row in rows for note in row.notes]


def _cells(measure: Measure) -> tuple[str, ...]:
    unit, size = _unit(measure)
    values = (min(measure.values), measure.median, max(measure.values))
    goal, verdict = "", ""
    if measure.goal:
        least, most = measure.goal.at_least, measure.goal.at_most
        goal = f"≥ {_show(least / size)}" if least is not None else ""
        goal = f"≤ {_show(most / size)}" if most is not None else goal
        short = measure.short_by
        verdict = "[green]reached[/green]"
        if short is not None:
            verdict = f"[yellow]short by {_show(short / size)}[/yellow]"
    shown = (_show(value / size) for value in values)
    return (f"  {measure.label}", unit, *shown, goal, verdict)


def _unit(measure: Measure) -> tuple[str, float]:
    """Give the unit to show a measure in, and how much of its own that is."""
    for suffix, unit in UNITS.items():
        if measure.name.endswith(suffix):
            return ("us", 1e-6) if unit[0] == "s" and measure.median < 0.1 else unit
    return "", 1.0


def _show(value: float) -> str:
    """Write three digits, or as many as stand before the point."""
    if value == int(value):
        return str(int(value))
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"
