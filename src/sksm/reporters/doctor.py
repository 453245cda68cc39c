"""`sksm doctor` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from sksm.reporters import tables

if TYPE_CHECKING:
    from rich.table import Table

    from sksm.commands.doctor import EngineEntry, Entry


_WIDTHS = 21, 7
_ROOM = 80 - sum(_WIDTHS) - 2 * 2  # characters of the last column


def show(entries: list[Entry], engines: list[EngineEntry]) -> None:
    """Print the table of features, then what follows from it."""
    console = tables.out()
    table = _table()
    for entry in entries:
        table.add_row(entry.name, _mark(entry.works, entry.informs), _about(entry))
    console.print("[bold]What the kernel has, tried just now[/]")
    console.print(table)
    console.print("\n[bold]Ways to merge[/]")
    table = _table()
    for way in engines:
        table.add_row(way.name, _mark(way.works), escape(way.detail))
    console.print(table)
    if not any(way.works for way in engines):
        console.print("\n[red]Nothing can be merged here.[/]")


def _table() -> Table:
    table = tables.grid("", "", "", indent=0)
    for column, width in zip(table.columns, _WIDTHS, strict=False):
        column.min_width = width  # the same in both tables
    return table


def _mark(works: bool, informs: bool = False) -> str:
    if works:
        return "[dim]info[/]" if informs else "[green]works[/]"
    return "[yellow]missing[/]"


def _about(entry: Entry) -> str:
    if not entry.works:
        remedy = f"[dim]to get it: {escape(entry.remedy)}[/]"
        return f"{entry.purpose}\n[yellow]{escape(entry.reason or '')}[/]\n{remedy}"
    if not entry.detail:
        return entry.purpose
    fits = len(entry.purpose) + len(entry.detail) + 2 <= _ROOM
    return f"{entry.purpose}{': ' if fits else chr(10)}[cyan]{escape(entry.detail)}[/]"
