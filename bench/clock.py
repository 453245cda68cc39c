"""Timing a merge and the first read of what it left, again and again."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import NamedTuple

from bench.memory import Words
from bench.results import Goal, Measure


class Times(NamedTuple):
    """One merge, in seconds."""

    merge: float
    read: float  # the program's first look at every byte afterwards

    @property
    def both(self) -> float:
        """Merge and first read."""
        return self.merge + self.read


def timed(array: Words, merge: Callable[[Words], object]) -> Times:
    """Merge `array`, read all of it, and say how long each took."""
    gc.collect()
    start = time.perf_counter()
    merge(array)
    middle = time.perf_counter()
    array.sum()
    return Times(middle - start, time.perf_counter() - middle)


def against_floor(
    size: int, floor: list[Times], ours: list[Times], goal: Goal | None
) -> list[Measure]:
    """Hold ours against the floor, round by round: alone, and with the read."""
    pairs = list(zip(floor, ours, strict=True))
    alone = [low.merge / our.merge for low, our in pairs]
    both = [low.both / our.both for low, our in pairs]
    return [
        rate("floor", "floor", size, [low.merge for low in floor]),
        rate("merge", "sksm.merge", size, [our.merge for our in ours]),
        Measure("merge_to_floor_ratio", "  of the floor", alone, goal),
        rate("floor_and_read", "floor + first read", size, [t.both for t in floor]),
        rate("merge_and_read", "merge + first read", size, [t.both for t in ours]),
        Measure("merge_and_read_to_floor_ratio", "  of the floor", both, goal),
    ]


def rate(
    name: str, label: str, size: int, seconds: list[float], goal: Goal | None = None
) -> Measure:
    """Turn times into bytes per second."""
    values = [size / second for second in seconds]
    return Measure(f"{name}_bytes_per_second", label, values, goal)
