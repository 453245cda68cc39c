"""Numbers and marks as people read them."""

from __future__ import annotations

import math

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
