"""What a scanner remembers of a process's pages: 10 bytes for each.

Pages are kept by blocks of 512, as a page table has them, so that a process that uses
little of a large mapping takes little here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sksm.holding import Prints
from sksm.spans import HUGE_SIZE, PAGE_SIZE
from sksm.twins import Flags

Numbers = npt.NDArray[np.int64]

_BLOCK = HUGE_SIZE // PAGE_SIZE
_NEVER, _OLDEST = 255, 254  # seconds: not seen yet, and as old as they get
_MERGED = 0x80  # of a page's state; the rest counts how often it did not stay so
_MOST_STRIKES = 15
NO_PRINT = np.uint64(0)


class Pages:
    """How long pages have been unwritten, what they hold, and which are merged.

    A page that was written to after it had been merged, or could not be merged, has
    to stay unwritten twice as long before it is looked at again, each time.

    Args:
        quiet_seconds: how long at first.
    """

    def __init__(self, quiet_seconds: float) -> None:
        self._blocks: Numbers = np.empty(0, np.int64)  # page number // 512, ascending
        self._ages = np.empty((0, _BLOCK), np.uint8)
        self._states = np.empty((0, _BLOCK), np.uint8)
        self._prints = np.empty((0, _BLOCK), np.uint64)
        # By state: merged ones are never looked at.
        self._waits = np.full(256, _NEVER, np.uint8)
        self.await_quiet(quiet_seconds)

    def await_quiet(self, seconds: float) -> None:
        """Have pages be unwritten for so long from now on, 250 seconds at most."""
        waits = np.ceil(seconds) * 2.0 ** np.arange(_MERGED)
        self._waits[:_MERGED] = np.minimum(waits, _OLDEST)

    @property
    def nbytes(self) -> int:
        """Memory that this takes."""
        columns = (self._blocks, self._ages, self._states, self._prints)
        return sum(column.nbytes for column in columns)

    def grow_older(self, seconds: float) -> None:
        """Let time pass, in whole seconds, at least one."""
        step = np.uint8(min(max(1, round(seconds)), _OLDEST))
        ages = self._ages
        young = ages < _OLDEST - step
        np.add(ages, step, out=ages, where=young)
        ages[~young & (ages != _NEVER)] = _OLDEST

    def write(self, numbers: Numbers) -> int:
        """Note that pages were written to. Gives how many of them had been merged."""
        at = self._places(numbers)
        states = self._states.reshape(-1)
        unmerged = at[states[at] >= _MERGED]
        states[unmerged] -= _MERGED
        self._strike(unmerged)
        self._ages.reshape(-1)[at] = 0
        self._prints.reshape(-1)[at] = NO_PRINT
        return len(unmerged)

    def strike(self, numbers: Numbers) -> None:
        """Leave pages alone for longer than the last time."""
        at = self._places(numbers)
        self._strike(at)
        self._ages.reshape(-1)[at] = 0
        self._prints.reshape(-1)[at] = NO_PRINT

    def _strike(self, at: Numbers) -> None:
        states = self._states.reshape(-1)
        states[at] = np.minimum(states[at] + 1, _MOST_STRIKES)

    def merge(self, numbers: Numbers) -> None:
        """Note that pages are merged."""
        at = self._places(numbers)
        states = self._states.reshape(-1)
        states[at] |= _MERGED
        self._ages.reshape(-1)[at] = 0
        self._prints.reshape(-1)[at] = NO_PRINT

    def forget(self, numbers: Numbers) -> None:
        """Note that pages are there no more."""
        at = self._places(numbers)
        self._ages.reshape(-1)[at] = _NEVER
        self._states.reshape(-1)[at] = 0
        self._prints.reshape(-1)[at] = NO_PRINT

    def due(self) -> Numbers:
        """List the pages that are to be read now: unwritten for long enough."""
        enough = (self._ages >= self._waits[self._states]) & (self._ages != _NEVER)
        enough &= self._prints == NO_PRINT
        return self._numbers(enough)

    def name(self, numbers: Numbers, prints: Prints) -> None:
        """Remember what pages hold."""
        self._prints.reshape(-1)[self._places(numbers)] = prints

    def prints(self, numbers: Numbers) -> Prints:
        """Give the fingerprints of pages; `NO_PRINT` where one was not read."""
        found: Prints = self._prints.reshape(-1)[self._places(numbers)]
        return found

    def names(self, numbers: Numbers) -> Prints | None:
        """Give the fingerprints of pages; None if some were not read."""
        prints = self.prints(numbers)
        return None if (prints == NO_PRINT).any() else prints

    def forget_prints(self) -> None:
        """Forget what all pages hold, but not how old they are."""
        self._prints[:] = NO_PRINT

    def named(self) -> tuple[Numbers, Prints]:
        """List the pages whose content is known, and their fingerprints."""
        known = self._prints != NO_PRINT
        return self._numbers(known), self._prints[known]

    def merged(self) -> int:
        """Count the pages that are merged."""
        return int(np.count_nonzero(self._states >= _MERGED))

    def seen(self) -> int:
        """Count the pages that there are."""
        return int(np.count_nonzero(self._ages != _NEVER))

    def keep(self, bounds: npt.NDArray[np.int64]) -> None:
        """Forget blocks that no mapping meets any more.

        Args:
            bounds: begin and end of each, ascending: shape (mappings, 2).
        """
        starts = self._blocks * HUGE_SIZE
        before = np.searchsorted(bounds[:, 0], starts + HUGE_SIZE)
        ends = np.concatenate(([0], bounds[:, 1]))[before]
        kept = ends > starts
        if not kept.all():
            self._blocks, self._ages = self._blocks[kept], self._ages[kept]
            self._states, self._prints = self._states[kept], self._prints[kept]

    def _numbers(self, flags: Flags) -> Numbers:
        rows, columns = np.nonzero(flags)
        return self._blocks[rows] * _BLOCK + columns

    def _places(self, numbers: Numbers) -> Numbers:
        """Find pages in the columns; makes room for new ones."""
        blocks = numbers // _BLOCK
        rows = np.searchsorted(self._blocks, blocks)
        known = rows < len(self._blocks)
        known[known] = self._blocks[rows[known]] == blocks[known]
        if not known.all():
            self._insert(np.unique(blocks[~known]))
            rows = np.searchsorted(self._blocks, blocks)
        places: Numbers = rows * _BLOCK + numbers % _BLOCK
        return places

    def _insert(self, blocks: Numbers) -> None:
        at = np.searchsorted(self._blocks, blocks)
        self._blocks = np.insert(self._blocks, at, blocks)
        self._ages = np.insert(self._ages, at, _NEVER, axis=0)
        self._states = np.insert(self._states, at, 0, axis=0)
        self._prints = np.insert(self._prints, at, NO_PRINT, axis=0)
