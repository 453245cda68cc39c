"""Fingerprint to slot, vectorised, at 20 bytes a page or less.

An open-addressing hash table of slot numbers only (4 bytes, at least a third
full) beside the fingerprint of each slot (8 bytes), which the table is compared
with and which reclaim needs anyway. All pages of a batch probe at once, a round
for each step, so what counts is the longest probe and not the mean: the steps
grow by one (triangular probing), which visits every place of a table whose size
is a power of two and does not queue up behind its neighbours.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sksm.store import UNSEEN

_T = TypeVar("_T", bound=np.generic)
_EMPTY = np.uint32(0xFFFF_FFFF)
_SMALLEST = 1 << 12
_FULLEST = 2 / 3


class Index:
    """Slots by fingerprint. One slot to a fingerprint; the first one stays."""

    def __init__(self) -> None:
        self._table = np.full(_SMALLEST, _EMPTY, np.uint32)
        self._prints = np.zeros(0, np.uint64)  # by slot
        self._used = np.zeros(0, bool)
        self._entries = 0
        self._filled = 0  # places of the table, those of forgotten slots included

    def __len__(self) -> int:
        return self._entries

    @property
    def nbytes(self) -> int:
        """Memory the index occupies, in bytes."""
        return self._table.nbytes + self._prints.nbytes + self._used.nbytes

    def lookup(self, prints: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Find each print's slot, `UNSEEN` where there is none."""
        slots = np.full(len(prints), UNSEEN, np.int64)
        asking = np.arange(len(prints))
        places = self._home(prints)
        step = 0
        while len(asking):
            found = self._table[places]
            met = found != _EMPTY
            asking, places, found = asking[met], places[met], found[met]
            same = (self._prints[found] == prints[asking]) & self._used[found]
            slots[asking[same]] = found[same]
            asking, places = asking[~same], places[~same]
            step += 1
            places = (places + step) & (len(self._table) - 1)
        return slots

    def insert(
        self, prints: npt.NDArray[np.uint64], slots: npt.NDArray[np.int64]
    ) -> None:
        """Enter prints that are not there yet, each once, with their slots."""
        if not len(prints):
            return
        self._make_room(int(slots.max()) + 1, len(prints))
        self._prints[slots] = prints
        self._used[slots] = True
        self._entries += len(prints)
        self._enter(slots.astype(np.uint32), prints)

    def remove(self, slots: npt.NDArray[np.int64]) -> None:
        """Forget slots, each in use. Their places in the table stay filled.

        A place leads to a slot, and it is the slot that has a fingerprint. So one that
        is left from before does no harm when the slot is used again.
        """
        self._used[slots] = False
        self._entries -= len(slots)

    def used(self) -> npt.NDArray[np.int64]:
        """List the slots in use, ascending."""
        return np.flatnonzero(self._used)

    def _home(self, prints: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        return (prints & np.uint64(len(self._table) - 1)).astype(np.int64)

    def _make_room(self, slots: int, more: int) -> None:
        if slots > len(self._prints):
            grown = max(slots, _SMALLEST, len(self._prints) * 9 // 8)
            self._prints = _longer(self._prints, grown)
            self._used = _longer(self._used, grown)
        size = len(self._table)
        while self._entries + more > size * _FULLEST:
            size *= 2
        if self._filled + more > len(self._table) * _FULLEST:
            self._rebuild(size)

    def _rebuild(self, size: int) -> None:
        self._table = np.full(size, _EMPTY, np.uint32)
        self._filled = 0
        slots = self.used()
        self._enter(slots.astype(np.uint32), self._prints[slots])

    def _enter(
        self, slots: npt.NDArray[np.uint32], prints: npt.NDArray[np.uint64]
    ) -> None:
        self._filled += len(slots)
        places = self._home(prints)
        step = 0
        while len(slots):
            free = self._table[places] == _EMPTY
            self._table[places[free]] = slots[free]  # of rivals, the last one wins
            left = self._table[places] != slots
            slots, places = slots[left], places[left]
            step += 1
            places = (places + step) & (len(self._table) - 1)


def _longer(array: npt.NDArray[_T], size: int) -> npt.NDArray[_T]:
    grown: npt.NDArray[_T] = np.zeros(size, array.dtype)
    grown[: len(array)] = array
    return grown
