"""`sksm estimate` for people, and as JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from sksm import pages
from sksm.reporters import json, tables, words
from sksm.reporters.words import size

if TYPE_CHECKING:
    from rich.console import Console

    from sksm.commands.outlook import Heat, Outlook
    from sksm.estimate import Figures

_MOST_PROCESSES = 20
_SHOWN_AFTER_SECONDS = 1.0
_HINT_BYTES = 1 << 20  # of arrays that begin at other places within their pages
# Not worth a line: they are shared already, or a page for each mapping.
_USUAL = (pages.UNWRITTEN_FILE, pages.LAST_PAGE)


def emit(found: Outlook, watched: float | None) -> None:
    """Print one JSON object."""
    json.emit(
        "estimate",
        seconds=found.seconds,
        watched_seconds=watched,
        total={
            **_flat(found.total, found.heat),
            "misaligned_bytes": found.misaligned_bytes,
        },
        engines=[
            {**dataclasses.asdict(gain), "net_bytes": gain.net_bytes}
            for gain in found.gains
        ],
        processes=[
            {
                "pid": one.pid,
                "name": one.name,
                **_flat(one.figures, one.heat),
                "misaligned_bytes": one.misaligned_bytes,
                "notes": one.notes,
            }
            for one in found.processes
        ],
        failures=[
            {"pid": one.pid, "error": str(one.error), "exit_code": one.error.exit_code}
            for one in found.failures
        ],
    )


def _flat(figures: Figures, heat: Heat | None) -> dict[str, Any]:
    return {
        **dataclasses.asdict(figures),
        "hot_bytes": heat and heat.hot_bytes,
        "cold_duplicate_bytes": heat and heat.cold.duplicate_bytes,
        "cold_zero_bytes": heat and heat.cold.zero_bytes,
    }


def show(found: Outlook) -> None:
    """Print who holds what, what merging would free, and what stands against it."""
    console = tables.out()
    _show_processes(console, found)
    _show_gains(console, found)
    _show_rest(console, found)


def _show_processes(console: Console, found: Outlook) -> None:
    watched = found.heat is not None
    columns = [">pid", "process", ">looked at", ">duplicates", ">zeros"]
    table = tables.grid(*columns, *([">hot"] if watched else []), ">runs")
    shown = found.processes[:_MOST_PROCESSES]
    rows = [(str(one.pid), one.name, one.figures, one.heat) for one in shown]
    if len(found.processes) > 1:
        rows.append(("", "in all", found.total, found.heat))
    for pid, name, figures, heat in rows:
        table.add_row(
            "",
            pid,
            escape(name),
            size(figures.looked_bytes),
            size(figures.duplicate_bytes),
            size(figures.zero_bytes),
            *([size(heat.hot_bytes)] if heat else []),
            f"{figures.runs:,}",
        )
    console.print(f"[bold]Private memory of {_these(found)}[/], read now")
    console.print(table)
    if len(found.processes) > len(shown):
        console.print(f"  ... and {len(found.processes) - len(shown)} more")
    console.print()


def _these(found: Outlook) -> str:
    return words.count(len(found.processes), "process")


def _show_gains(console: Console, found: Outlook) -> None:
    table = tables.grid("by engine", ">frees", ">costs", ">net")
    for gain in found.gains:
        colour = "green" if gain.net_bytes >= 0 else "red"
        table.add_row(
            "",
            gain.engine,
            size(gain.freed_bytes),
            size(gain.cost_bytes),
            f"[bold {colour}]{size(gain.net_bytes)}[/]",
        )
    cold = ", hot pages left out" if found.heat else ""
    console.print(f"[bold]Merging would save[/]{cold}")
    console.print(table)
    console.print()


def _show_rest(console: Console, found: Outlook) -> None:
    total = found.total
    lines = []
    if total.already_bytes:
        lines.append(
            f"Shared already (fork, zero page, sksm): {size(total.already_bytes)}."
        )
    if total.huge_bytes:
        lines.append(f"Huge pages that would be split: {size(total.huge_bytes)}.")
    if (nbytes := found.misaligned_bytes) >= _HINT_BYTES:
        more = "" if found.misaligned_whole else " at least"
        lines.append(
            f"Equal, but at another place within the page: {size(nbytes)}{more}. "
            "sksm.empty gives arrays that begin on a page."
        )
    refused = [
        f"{size(nbytes)} ({reason})"
        for reason, nbytes in sorted(total.refused_bytes.items())
        if reason not in _USUAL
    ]
    if refused:
        lines.append(f"Left out: {', '.join(refused)}.")
    for one in found.processes:
        lines += [f"Process {one.pid}: {note}." for note in one.notes]
    if not found.heat:
        lines.append("Pages that are written to do not stay merged: see --watch.")
    for line in lines:
        console.print(f"[dim]{escape(line)}[/]")
