"""From slots per page to the fewest mappings: pure arithmetic."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt

from sksm.process import EXCHANGE_PAGES
from sksm.store import UNSEEN, ZERO

# A gap of up to this many pages is mapped across, its own bytes written back:
# that costs a copy, where two more mappings cost 0.6 KiB of kernel memory, for
# ever, and count against vm.max_map_count.
SHORT_GAP = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring pages of a batch that one mapping can cover.

    `first` and `stop` are indices into the batch. The pages in `own` (pairs of
    indices) are covered but keep their bytes. A `slot` of None: all zeros.
    """

    first: int
    stop: int
    slot: int | None
    own: tuple[tuple[int, int], ...] = ()

    @property
    def shared(self) -> int:
        """How many pages of the run share a frame afterwards."""
        return self.stop - self.first - sum(stop - first for first, stop in self.own)

    def without_own(self) -> list[Run]:
        """Return what is left of the run between its own pages."""
        assert self.slot is not None
        edges = [self.first, *itertools.chain.from_iterable(self.own), self.stop]
        return [
            Run(first, stop, self.slot + first - self.first)
            for first, stop in zip(edges[::2], edges[1::2], strict=True)
        ]

    def shifted(self, by: int) -> Run:
        """Give the run in the indices of a longer batch."""
        own = tuple((first + by, stop + by) for first, stop in self.own)
        return Run(self.first + by, self.stop + by, self.slot, own)


def own_gaps(
    numbers: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Find the unseen pages that a mapping had better cover than go around.

    Args:
        numbers: page numbers, ascending, shape (n,).
        slots: a slot, `UNSEEN` or `ZERO` for each.

    Returns:
        True for the pages of short gaps between two pages of one straight run:
        as far apart in the pool as in memory, and nothing but unseen between.
    """
    gaps = np.zeros(len(slots), bool)
    seen = np.flatnonzero(slots != UNSEEN)
    if len(seen) < 2 or len(seen) == len(slots):
        return gaps
    left, right = seen[:-1], seen[1:]
    apart = right - left
    bridged = (
        (apart > 1)
        & (apart <= SHORT_GAP + 1)
        & (slots[left] >= 0)
        & (slots[right] >= 0)
        & (slots[right] - slots[left] == apart)
        & (numbers[right] - numbers[left] == apart)
    )
    edges = np.zeros(len(slots) + 1, np.int64)
    edges[left[bridged] + 1] += 1
    edges[right[bridged]] -= 1
    return np.cumsum(edges[:-1]) > 0


def runs(
    numbers: npt.NDArray[np.int64],
    slots: npt.NDArray[np.int64],
    own: npt.NDArray[np.bool_],
) -> list[Run]:
    """Cut a batch into runs, leaving out the pages that stay as they are.

    Long runs are cut at multiples of `EXCHANGE_PAGES`; the kernel joins their
    mappings again.
    """
    if not len(slots):
        return []
    pages = len(slots)
    if numbers[-1] - numbers[0] == pages - 1 and slots[0] >= 0 and not own.any():
        expected = np.arange(slots[0], slots[0] + pages)
        if (slots == expected).all():
            return straight(int(numbers[0]), int(slots[0]), pages)
    line = np.where(slots >= 0, slots - numbers, slots)  # equal along one mapping
    known = np.where(own, -1, np.arange(len(slots)))
    line = line[np.maximum.accumulate(known)]  # an own page goes with what precedes
    breaks = (np.diff(line) != 0) | (np.diff(numbers) != 1)
    breaks |= numbers[1:] % EXCHANGE_PAGES == 0
    bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(slots)]
    return [
        run
        for first, stop in itertools.pairwise(bounds)
        if (run := _run(first, stop, slots, own)) is not None
    ]


def straight(number: int, slot: int, pages: int) -> list[Run]:
    """Cut one straight run from page `number` and slot `slot` on, as `runs` does."""
    edges = range(
        -(-(number + 1) // EXCHANGE_PAGES) * EXCHANGE_PAGES,
        number + pages,
        EXCHANGE_PAGES,
    )
    bounds = [0, *(edge - number for edge in edges), pages]
    return [
        Run(first, stop, slot + first) for first, stop in itertools.pairwise(bounds)
    ]


def _run(
    first: int, stop: int, slots: npt.NDArray[np.int64], own: npt.NDArray[np.bool_]
) -> Run | None:
    """Make a run of neighbours on one line; own pages at its ends are left out."""
    if own[first:stop].all():
        return None
    while own[first]:
        first += 1
    while own[stop - 1]:
        stop -= 1
    slot = int(slots[first])
    if slot == UNSEEN:
        return None
    kept = _pairs(own[first:stop], first)
    return Run(first, stop, None if slot == ZERO else slot, kept)


def _pairs(mask: npt.NDArray[np.bool_], offset: int) -> tuple[tuple[int, int], ...]:
    if not mask.any():
        return ()
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask, [0])))) + offset
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
