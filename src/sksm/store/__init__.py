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
    promises is that a slot's bytes do not change while a lease is held or while
    any process maps it.
    """

    seed: int
    written: int  # from the last slot answered up to here, every slot holds a page
    keeper: int  # the process that holds it

    @property
    def pool(self) -> int:
        """A descriptor of the pool's file, fit for private mappings."""
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

    def lease(self) -> AbstractContextManager[object]:
        """Keep every slot as it is until the block ends."""
        ...

    def lookup(self, prints: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Find each fingerprint's slot; `UNSEEN` where there is none."""
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
