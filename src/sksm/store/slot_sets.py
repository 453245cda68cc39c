"""Sets of slots as runs: arithmetic on intervals, whatever lies between them.

A set is an int64 array of shape (runs, 2): the first slot of each run, and the one
behind its last. The runs of a normal set ascend and neither touch nor overlap.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Runs: TypeAlias = npt.NDArray[np.int64]
EMPTY: Runs = np.empty((0, 2), np.int64)


def of_slots(slots: npt.NDArray[np.int64]) -> Runs:
    """Return the normal set of some slots, in any order, negative ones left out."""
    slots = np.unique(slots[slots >= 0])
    if not len(slots):
        return EMPTY
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    firsts = slots[np.concatenate(([0], breaks))]
    stops = slots[np.concatenate((breaks - 1, [len(slots) - 1]))] + 1
    return np.stack([firsts, stops], axis=1)


def union(sets: Iterable[Runs]) -> Runs:
    """Return the normal set of all slots in any of `sets`, normal or not."""
    runs = np.concatenate([EMPTY, *sets])
    if len(runs) < 2:
        return runs
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    reached = np.maximum.accumulate(runs[:, 1])
    begins = np.concatenate(([True], runs[1:, 0] > reached[:-1]))
    ends = np.concatenate((begins[1:], [True]))
    return np.stack([runs[begins, 0], reached[ends]], axis=1)


def difference(some: Runs, others: Runs) -> Runs:
    """Return the slots of `some` that are not in `others`; both are normal sets."""
    if not len(some) or not len(others):
        return some
    edges = np.unique(np.concatenate([some.ravel(), others.ravel()]))
    firsts = edges[:-1]
    kept = _contain(some, firsts) & ~_contain(others, firsts)
    return union([np.stack([firsts[kept], edges[1:][kept]], axis=1)])


def count(runs: Runs) -> int:
    """Count the slots of a normal set."""
    return int((runs[:, 1] - runs[:, 0]).sum())


def slots_of(runs: Runs) -> npt.NDArray[np.int64]:
    """List the slots of a normal set, ascending."""
    lengths = runs[:, 1] - runs[:, 0]
    starts = np.repeat(runs[:, 0] - np.cumsum(lengths) + lengths, lengths)
    return starts + np.arange(len(starts))


def _contain(runs: Runs, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    at = np.searchsorted(runs[:, 0], slots, side="right") - 1
    inside: npt.NDArray[np.bool_] = (at >= 0) & (slots < runs[at, 1])
    return inside
