"""Which pages have been offered before, and the pool page each was given."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from sksm.spans import Span

# Where a slot is expected, but there is none: nobody offered such a page; all
# zeros, which the kernel shares by itself.
UNSEEN, ZERO = -1, -2


# A slot for each page, `UNSEEN` where it was not taken; whether the page is new;
# and why some were refused, or "".
Offered: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], str]


class Store(Protocol):
    """Fingerprints to slots, and a file that holds slot i at page i.

    Everything it answers is a hint: who maps a slot compares first. What it
    promises is that the bytes of a slot that `lookup`, `offer` or `claim` answered do
    not change while `pool` is open as it was then, or a mapping made through it is
    left, in any process.
    """

    seed: int
    keeper: int  # the process that holds it

    @property
    def pool(self) -> int:
        """A descriptor of the pool's file, fit for private mappings. In `granted` only.

        Mappings are made through this descriptor, or through one that was passed on:
        opened anew, the file is another open file description, which keeps no slot.
        """
        ...

    @property
    def name(self) -> str:
        """What /proc/PID/maps shows for the pool's file, behind "memfd:"."""
        ...

    def alive(self) -> bool:
        """Say whether what holds the store is there still, asking it nothing."""
        ...

    def upkeep_bytes(self) -> int:
        """Say what the store takes for the first page that it will hold, and for none.

        Zero if it holds pages already, or takes nothing when we are done.
        """
        ...

    def give_back(self) -> None:
        """Free, now and not sometime, slots that nobody maps any more."""
        ...

    def pool_bytes(self) -> int:
        """Return how much memory the pool occupies."""
        ...

    def granted(self) -> AbstractContextManager[object]:
        """Be able to map slots in the block."""
        ...

    def let_go(self) -> None:
        """Keep no slot that is not mapped. Not in `granted`."""
        ...

    def lookup(self, prints: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Find each fingerprint's slot; `UNSEEN` where there is none."""
        ...

    def knows(self, prints: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Say which fingerprints have a slot just now, without being given it."""
        ...

    def claim(self, slot: int, pages: int) -> bool:
        """Ask for `pages` slots in a row from `slot` on; False if some hold no page."""
        ...

    def mapped(self, slot: int, pages: int) -> None:
        """Note that slots in a row have been mapped. Others are free after `granted`.

        Where nobody can say what was mapped, `in_doubt` keeps all of them.
        """
        ...

    def in_doubt(self) -> None:
        """Keep all slots that were answered: any of them may be mapped yet."""
        ...

    def offer(self, pid: int, spans: Iterable[Span], *, alone: bool = False) -> Offered:
        """Take the pages of `spans` of process `pid` into the pool, unless known.

        Args:
            pid: the process.
            spans: whole pages of it, that are in memory.
            alone: to slots behind which there are only holes, as far as addresses
                reach: such as are needed for mappings that may grow.
        """
        ...

    def offers(
        self, pid: int, parts: Iterable[list[Span]]
    ) -> Generator[Offered, None, None]:
        """Offer several times in a row, the next one under way while one is used.

        No other call of the store may come before the last answer was taken, or
        the iterator was closed.
        """
        ...
