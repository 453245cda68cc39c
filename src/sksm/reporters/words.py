"""Numbers and marks as people read them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # 0.1 s, and memory that a service would hold for nothing
    from rich.console import Console
    from rich.table import Table

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(nbytes: float) -> str:
    """Write a number of bytes: "86.6 MiB". Negative ones keep their sign."""
    step = min(int(math.log2(abs(nbytes)) // 10), len(_UNITS) - 1) if nbytes else 0
    step = max(0, step)
    digits = 1 if step else 0
    return f"{nbytes / 1024**step:,.{digits}f} {_UNITS[step]}"


def duration(seconds: float) -> str:
    """Write a time: "12 ms", "0.85 s", "2.5 min"."""
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min"


def count(number: int, noun: str) -> str:
    """Write "1 process", "3 processes"."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def out() -> Console:
    """Give the console on stdout, made now: tests replace the stream."""
    from rich.console import Console  # noqa: PLC0415

    return Console(highlight=False)


def grid(*columns: str, indent: int = 2) -> Table:
    """Make a table without lines; a column's name beginning with ">" goes right."""
    from rich.table import Table  # noqa: PLC0415

    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", title=None
    )
    table.add_column("", width=max(0, indent - 2), no_wrap=True)
    for name in columns:
        right = name.startswith(">")
        table.add_column(
            name.lstrip(">"), justify="right" if right else "left", no_wrap=right
        )
    return table
