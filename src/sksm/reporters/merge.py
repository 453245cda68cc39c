"""`sksm merge` and `sksm unmerge` for people, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.markup import escape

from sksm.errors import SksmError, Unsupported
from sksm.process import runtimes
from sksm.report import MergeReport
from sksm.reporters import json, tables, words
from sksm.reporters.words import duration, size
from sksm.spans import PAGE_SIZE

if TYPE_CHECKING:
    from rich.console import Console

    from sksm.others import Wishes
    from sksm.outcomes import Outcome

_MOST_PROCESSES = 20


def warn(outcomes: Sequence[Outcome]) -> None:
    """Say on stderr where the pool is used although it may not be safe."""
    for one in outcomes:
        if one.worth and (reason := runtimes.doubt(one.pid)):
            click.echo(f"sksm: warning: process {one.pid}: {reason}", err=True)


def errors(outcomes: Sequence[Outcome]) -> list[SksmError]:
    """List what went wrong, a process each."""
    return [error for one in outcomes if (error := _error(one))]


def _error(one: Outcome) -> SksmError | None:
    if one.refusal:
        return Unsupported(f"process {one.pid} was left alone: {one.refusal}")
    return one.error


def emit(outcomes: Sequence[Outcome], wishes: Wishes) -> None:
    """Print what a merge did as one JSON object."""
    total = MergeReport()
    for one in outcomes:
        total += one.report
    json.emit(
        "merge",
        engine=_engine(outcomes),
        dry_run=wishes.dry_run,
        watched_seconds=wishes.watch_seconds,
        **_common(outcomes),
        **total.as_dict(),
        hot_bytes=sum(one.hot_bytes for one in outcomes),
        duplicate_bytes=_sum(outcomes, "duplicate_bytes"),
        zero_bytes=_sum(outcomes, "zero_bytes"),
        processes=[
            {
                "pid": one.pid,
                "name": one.name,
                "engine": one.engine,
                **one.report.as_dict(),
                "hot_bytes": one.hot_bytes,
                "duplicate_bytes": one.worth and one.worth.duplicate_bytes,
                **_common([one]),
            }
            for one in outcomes
            if not _error(one)
        ],
    )


def _engine(outcomes: Sequence[Outcome]) -> str:
    """Name the engine by which processes were merged; "mixed" if there were more."""
    engines = {one.engine for one in outcomes if not _error(one)}
    return engines.pop() if len(engines) == 1 else "mixed" if engines else "none"


def emit_unmerged(outcomes: Sequence[Outcome]) -> None:
    """Print what un-merging did as one JSON object."""
    json.emit(
        "unmerge",
        unmerged_bytes=sum(one.unmerged_bytes for one in outcomes),
        **_common(outcomes),
        processes=[
            {
                "pid": one.pid,
                "name": one.name,
                "unmerged_bytes": one.unmerged_bytes,
                **_common([one]),
            }
            for one in outcomes
            if not _error(one)
        ],
    )


def _common(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Give what is told of all processes, and of each."""
    stops = [seconds for one in outcomes for seconds in one.stops]
    return {
        "pss_before_bytes": sum(one.pss_before for one in outcomes),
        "pss_after_bytes": sum(one.pss_after for one in outcomes),
        "stops": len(stops),
        "stopped_p99_seconds": _p99(stops),
        "stopped_max_seconds": max(stops, default=0.0),
        "failures": [
            {"pid": one.pid, "error": str(error), "exit_code": error.exit_code}
            for one in outcomes
            if (error := _error(one))
        ],
    }


def _p99(stops: Sequence[float]) -> float:
    return float(np.quantile(stops, 0.99)) if stops else 0.0


def _sum(outcomes: Sequence[Outcome], field: str) -> int:
    return sum(getattr(one.worth, field) for one in outcomes if one.worth)


def show(outcomes: Sequence[Outcome], wishes: Wishes) -> None:
    """Print what a merge did, or would do."""
    console = tables.out()
    done = [one for one in outcomes if not _error(one)]
    if wishes.dry_run:
        _show_plan(console, done)
        return
    table = tables.grid(
        ">pid", "process", ">merged", ">zeros", ">first copy", ">PSS before", ">after"
    )
    for one in done[:_MOST_PROCESSES]:
        report = one.report
        pages = (report.merged, report.zero, report.stored)
        sizes = (size(count * PAGE_SIZE) for count in pages)
        memory = size(one.pss_before), size(one.pss_after)
        table.add_row("", str(one.pid), escape(one.name), *sizes, *memory)
    console.print(table)
    if len(done) > _MOST_PROCESSES:
        console.print(f"  ... and {len(done) - _MOST_PROCESSES} more")
    before, after = (sum(getattr(one, f"pss_{x}") for one in done) for x in _TIMES)
    console.print(
        f"\n[bold]Memory of {words.count(len(done), 'process')}[/] (sum of PSS, the "
        f"pool's part of each included): {size(before)} -> {size(after)}, "
        f"[bold green]{size(before - after)} less[/]"
    )
    _show_stops(console, done)
    _show_left(console, done)
    console.print("[dim]RSS does not fall: it counts shared pages in full.[/]")


_TIMES = ("before", "after")


def _show_plan(console: Console, done: Sequence[Outcome]) -> None:
    table = tables.grid(">pid", "process", ">would be merged", ">zeros", ">hot")
    for one in done:
        if one.worth:
            found = (one.worth.twin_bytes, one.worth.zero_bytes, one.hot_bytes)
            table.add_row("", str(one.pid), escape(one.name), *map(size, found))
    console.print(table)
    console.print(f"\nIt would free {size(_sum(done, 'duplicate_bytes'))}, and zeros.")


def _show_stops(console: Console, done: Sequence[Outcome]) -> None:
    stops = [seconds for one in done for seconds in one.stops]
    if stops:
        console.print(
            f"Stopped {words.count(len(stops), 'time')}: {duration(_p99(stops))} at "
            f"most in 99 of 100, {duration(max(stops))} the longest"
        )


def _show_left(console: Console, done: Sequence[Outcome]) -> None:
    left: Counter[str] = Counter()
    for one in done:
        left.update(one.report.reasons)
        left["changed meanwhile"] += one.report.changed
    for reason, pages in left.most_common():
        if pages:
            nbytes = size(pages * PAGE_SIZE)
            console.print(f"[dim]Left alone, {escape(reason)}: {nbytes}.[/]")


def show_unmerged(outcomes: Sequence[Outcome]) -> None:
    """Print what un-merging did."""
    console = tables.out()
    table = tables.grid(">pid", "process", ">un-merged", ">PSS before", ">after")
    done = [one for one in outcomes if not _error(one)]
    for one in done:
        sizes = (one.unmerged_bytes, one.pss_before, one.pss_after)
        table.add_row("", str(one.pid), escape(one.name), *map(size, sizes))
    console.print(table)
    _show_stops(console, done)
