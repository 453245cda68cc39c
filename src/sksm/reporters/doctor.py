"""`sksm doctor` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from sksm.reporters import words

if TYPE_CHECKING:
    from sksm.commands.doctor import EngineEntry, Entry


_ROOM = 80 - 21 - 7 - 2 * 2  # characters of the last column


def show(entries: list[Entry], engines: list[EngineEntry]) -> None:
    """Print the table of features, then what follows from it."""
    console = words.out()
    table = _table(width=21)
    for entry in entries:
        table.add_row(entry.name, _mark(entry.works, entry.informs), _about(entry))
    console.print("[bold]What the kernel has, tried just now[/]")
    console.print(table)
    console.print("\n[bold]Ways to merge[/]")
    table = _table(width=21)
    for way in engines:
        table.add_row(way.name, _mark(way.works), way.detail)
    console.print(table)
    if not any(way.works for way in engines):
        console.print("\n[red]Nothing can be merged here.[/]")


def _table(width: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=width, no_wrap=True)
    table.add_column(width=7)
    table.add_column()
    return table


def _mark(works: bool, informs: bool = False) -> str:
    if works:
        return "[dim]info[/]" if informs else "[green]works[/]"
    return "[yellow]missing[/]"


def _about(entry: Entry) -> str:
    if not entry.works:
        remedy = f"[dim]to get it: {entry.remedy}[/]"
        return f"{entry.purpose}\n[yellow]{entry.reason}[/]\n{remedy}"
    if not entry.detail:
        return entry.purpose
    fits = len(entry.purpose) + len(entry.detail) + 2 <= _ROOM
    return f"{entry.purpose}{': ' if fits else chr(10)}[cyan]{entry.detail}[/]"
