"""`sksm doctor PID` for people, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from sksm.reporters import json, tables
from sksm.reporters.words import size

if TYPE_CHECKING:
    from sksm.commands.diagnosis import Diagnosis


def emit(found: Sequence[Diagnosis]) -> None:
    """Print one JSON object."""
    processes = []
    for one in found:
        if one.error:
            continue
        fields = dataclasses.asdict(one)
        del fields["error"]
        processes.append(fields)
    json.emit(
        "doctor",
        processes=processes,
        failures=[
            {"pid": one.pid, "error": str(one.error), "exit_code": one.error.exit_code}
            for one in found
            if one.error
        ],
    )


def show(found: Sequence[Diagnosis]) -> None:
    """Print a table for each process."""
    console = tables.out()
    for one in found:
        if one.error:
            continue
        console.print(f"[bold]Process {one.pid}, {escape(one.name)}[/]")
        table = tables.grid(">", "", "")
        for part in one.parts:
            help_ = f"[dim]{escape(part.remedy)}[/]" if part.remedy else ""
            about = "\n".join(filter(None, (escape(part.meaning), help_)))
            table.add_row("", size(part.size_bytes), escape(part.what), about)
        console.print(table)
        if one.engine:
            console.print(f"  `sksm merge` would use the engine {one.engine}.")
        else:
            console.print(f"  [yellow]It would be left alone: {escape(one.refusal)}[/]")
        console.print(f"  [dim]seccomp: {escape(one.seccomp)}[/]")
        console.print(f"  [dim]KSM: {escape(one.ksm)}[/]\n")
