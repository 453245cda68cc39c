"""What merging a set of processes would save. Reads only, and stops nobody.

It keeps 33 bytes of each page, 8.3 MiB a GiB (`holding`), and takes three times as
much again while it compares them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from sksm.engines import plan
from sksm.fingerprints import new_seed, of_zeros
from sksm.holding import Holding, Lookup, read
from sksm.process import AddressSpace
from sksm.spans import HUGE_SIZE, PAGE_SIZE, Span
from sksm.store import ZERO
from sksm.twins import Flags, Twins, compare, pieces

_NAME = np.uint64
_ENDED = (ProcessLookupError, FileNotFoundError)


@dataclasses.dataclass(slots=True)
class Figures:
    """What one process holds, or all of them."""

    looked_bytes: int = 0  # private memory that was read
    zero_bytes: int = 0  # pages of zeros among it, which would be freed
    twin_bytes: int = 0  # pages with an equal page in another frame, zeros apart
    kept_bytes: int = 0  # of the twins' frames, the one of each that must remain
    duplicate_bytes: int = 0  # of the twins' frames, those that would be freed
    already_bytes: int = 0  # shares a frame now: pool, zero page, fork, ksm
    huge_bytes: int = 0  # huge pages that would be split
    span_pages: int = 0  # what a merge would be given: twins, zeros, short gaps
    runs: int = 0  # of neighbouring pages that are zeros or twins
    mappings: int = 0  # that the pool engine would put in their place
    refused_bytes: dict[str, int] = dataclasses.field(default_factory=dict)

    def __iadd__(self, other: Figures) -> Figures:
        for field in dataclasses.fields(self)[:-1]:
            both = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, both)
        for reason, nbytes in other.refused_bytes.items():
            self.refused_bytes[reason] = self.refused_bytes.get(reason, 0) + nbytes
        return self


@dataclasses.dataclass(frozen=True, slots=True)
class Worth:
    """What one process holds twice; as in `Figures`."""

    twin_bytes: int
    duplicate_bytes: int
    zero_bytes: int


class Estimate:
    """Reads processes one by one, then compares them with each other.

    Args:
        seed: of the fingerprints; random unless they must be those of a store.
        known: tells which fingerprints a store has, under that seed.
        pool: the name of that store's pool. Without, pages of any pool count as
            merged; with it those of others are read.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        known: Lookup | None = None,
        pool: str | None = None,
    ) -> None:
        self.seed = new_seed() if seed is None else seed
        self.holdings: dict[int, Holding] = {}
        self._known = known
        self._pool = pool
        self._compared: dict[int, Twins] | None = None
        self._figures: dict[int, Figures] = {}

    def add(
        self, space: AddressSpace, tell: Callable[[float], None] | None = None
    ) -> bool:
        """Read a process, once. False if it ended meanwhile: it holds nothing.

        Args:
            space: whose memory.
            tell: hears of every group of pages read, and how many they were.

        Raises:
            PermissionError: without leave to look at it.
        """
        try:
            self.holdings[space.pid] = read(
                space, self.seed, known=self._known, pool=self._pool, tell=tell
            )
        except _ENDED:
            return False
        self._forget()
        return True

    def remove(self, pid: int) -> None:
        """Leave a process out that ended since it was read."""
        del self.holdings[pid]
        self._forget()

    def _forget(self) -> None:
        self._compared = None
        self._figures.clear()

    def apart(self, pages: dict[int, Flags]) -> Estimate:
        """Give an estimate in which these pages of each process equal no other."""
        other = Estimate(seed=self.seed, known=self._known, pool=self._pool)
        chance = np.random.default_rng()
        for pid, holding in self.holdings.items():
            unlike, prints = pages[pid], holding.prints.copy()
            # A random fingerprint is as unlikely as a collision to be any page's.
            prints[unlike] = chance.integers(1 << 64, size=unlike.sum(), dtype=_NAME)
            known = holding.known & ~unlike
            other.holdings[pid] = dataclasses.replace(
                holding, prints=prints, known=known
            )
        return other

    def twins(self, pid: int) -> list[Span]:
        """List the spans of a process that are worth merging, ascending.

        Their pages hold zeros, or have a twin: an equal page somewhere in the set
        (in this process, too) or in the pool. Short gaps of other pages that may be
        merged are included; no span has parts of two mappings.
        """
        found = self.compared[pid]
        holding = self.holdings[pid]
        numbers = holding.numbers
        wanted = found.twin | (self._zero(holding) & ~found.outside)
        return [
            Span(int(numbers[first]) * PAGE_SIZE, (int(numbers[last]) + 1) * PAGE_SIZE)
            for first, last in pieces(wanted, holding.stretch, plan.SHORT_GAP)
            - np.array([0, 1])
        ]

    def figures(self, pid: int) -> Figures:
        """Sum up one process.

        Of equal pages the first that was read is the one to keep, so those of the
        processes add up to those of the whole set.
        """
        if pid not in self._figures:
            self._figures[pid] = self._sum_up(pid)
        return self._figures[pid]

    def _sum_up(self, pid: int) -> Figures:
        holding, found, worth = self.holdings[pid], self.compared[pid], self.worth(pid)
        zero = self._zero(holding) & ~found.outside
        wanted = found.twin | zero
        spans = pieces(wanted, holding.stretch, plan.SHORT_GAP)
        slots = np.where(zero, ZERO, found.slots)
        own = plan.own_gaps(holding.numbers, slots)
        return Figures(
            looked_bytes=len(zero) * PAGE_SIZE,
            **dataclasses.asdict(worth),
            kept_bytes=_size(found.kept),
            already_bytes=_size(found.shares) + holding.others.already * PAGE_SIZE,
            huge_bytes=_split(holding, wanted) * HUGE_SIZE,
            span_pages=int(np.diff(spans).sum()),
            runs=len(pieces(wanted, holding.stretch, 0)),
            mappings=_straight(plan.runs(holding.numbers, slots, own)),
            refused_bytes={
                reason: count * PAGE_SIZE
                for reason, count in holding.others.reasons.items()
            },
        )

    def worth(self, pid: int) -> Worth:
        """Say what merging one process is about; quicker than `figures`."""
        holding, found = self.holdings[pid], self.compared[pid]
        zero = self._zero(holding) & ~found.outside & ~found.shares
        return Worth(_size(found.twin), _size(found.freed), _size(zero))

    def total(self) -> Figures:
        """Sum up all processes."""
        total = Figures()
        for pid in self.holdings:
            total += self.figures(pid)
        return total

    def _zero(self, holding: Holding) -> Flags:
        zero: Flags = holding.prints == np.uint64(of_zeros(self.seed))
        return zero

    @property
    def compared(self) -> dict[int, Twins]:
        """What becomes of each page of each process; found out when first asked."""
        if self._compared is None:
            self._compared = dict(self._compare())
        return self._compared

    def _compare(self) -> Iterator[tuple[int, Twins]]:
        held = list(self.holdings.values())
        if not held:
            return
        whole = compare(
            np.concatenate([one.prints for one in held]),
            np.concatenate([one.frames for one in held]),
            np.concatenate([one.known for one in held]),
            of_zeros(self.seed),
        )
        columns = [getattr(whole, field.name) for field in dataclasses.fields(whole)]
        at = 0
        for one in held:
            stop = at + len(one.numbers)
            yield one.pid, Twins(*(column[at:stop] for column in columns))
            at = stop


def _size(flags: Flags) -> int:
    return int(np.count_nonzero(flags)) * PAGE_SIZE


def _split(holding: Holding, wanted: Flags) -> int:
    """Count the huge pages in which some page is wanted."""
    numbers = holding.numbers[wanted]
    ends = holding.huge + HUGE_SIZE // PAGE_SIZE
    inside = np.searchsorted(numbers, ends) - np.searchsorted(numbers, holding.huge)
    return int(np.count_nonzero(inside))


def _straight(runs: list[plan.Run]) -> int:
    """Count the mappings that runs take: the kernel joins those in one line."""
    count, follows = 0, None
    for run in runs:
        slot = run.slot
        count += (run.first, slot) != follows
        follows = (run.stop, None if slot is None else slot + run.stop - run.first)
    return count
