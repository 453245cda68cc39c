"""Slots for pages that are objects by themselves.

A mapping of one page cannot be kept from growing (mremap(2)): it would show what lies
behind its slot. So behind these slots nothing ever lies, as far as addresses reach. A
hole of the pool's file reads as zeros, and so does memory that grows.

The kernel's table of the file's pages takes 3.4 KiB for each: six nodes that no other
page uses (lib/xarray.c).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sksm.store import UNSEEN

APART = 1 << 35  # slots from one to the next: 128 TiB
_MOST = (1 << 16) - 2  # of them, in a file of 8 EiB


class Alone:
    """Fingerprints to such slots."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}  # by fingerprint
        self._free: list[int] = []
        self._next = APART
        self._known: npt.NDArray[np.uint64] | None = None  # all of the fingerprints

    def __len__(self) -> int:
        return len(self._slots)

    def find(self, print_: int) -> int:
        """Give the slot of a fingerprint, or `UNSEEN`."""
        return self._slots.get(print_, UNSEEN)

    def fill_in(
        self, prints: npt.NDArray[np.uint64], slots: npt.NDArray[np.int64]
    ) -> None:
        """Give slots to those pages that have none yet, where there are some."""
        if not self._slots:
            return
        if self._known is None:
            self._known = np.fromiter(self._slots, np.uint64, len(self._slots))
        unseen = np.flatnonzero((slots == UNSEEN) & np.isin(prints, self._known))
        slots[unseen] = [self._slots[print_] for print_ in prints[unseen].tolist()]

    def choose(self) -> int:
        """Pick a free slot; `UNSEEN` if there are no more."""
        if self._free:
            return self._free[-1]
        return self._next if self._next <= _MOST * APART else UNSEEN

    def add(self, print_: int, slot: int) -> None:
        """Enter the slot that was chosen last, now that it is filled."""
        if self._free:
            self._free.pop()
        else:
            self._next += APART
        self._slots[print_] = slot
        self._known = None

    def used(self) -> npt.NDArray[np.int64]:
        """List the slots in use, ascending."""
        return np.array(sorted(self._slots.values()), np.int64)

    def remove(self, slots: npt.NDArray[np.int64]) -> None:
        """Forget slots."""
        gone = set(slots.tolist())
        self._slots = {p: slot for p, slot in self._slots.items() if slot not in gone}
        self._free += sorted(gone)
        self._known = None


def stands_alone(slots: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Say which slots are such."""
    return slots >= APART
