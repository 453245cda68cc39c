"""The pages of one process that may be merged: numbers, fingerprints, frames.

For each page 33 bytes are kept, which is 8.3 MiB a GiB.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sksm import pages
from sksm.fingerprints import fingerprint
from sksm.linux import pagemap
from sksm.linux.maps import Mapping
from sksm.linux.pagemap import Category
from sksm.process import AddressSpace, pages_of
from sksm.process.other import EVERYTHING
from sksm.report import MergeReport
from sksm.spans import HUGE_SIZE, PAGE_SIZE, Span, groups
from sksm.twins import Flags, stretches

Prints = npt.NDArray[np.uint64]
# Says which fingerprints a pool has.
Lookup = Callable[[Prints], npt.NDArray[np.bool_]]
_T = TypeVar("_T", np.int64, np.uint64)

VANISHED = "gone while it was read"
_GROUP_PAGES = 512  # read and fingerprinted at a time: they stay in the cache
_ENTRIES_GAP = 64  # pages: to read as many entries more is cheaper than a call
_PART_PAGES = 64  # where a group cannot be read, what is given up at a time


@dataclasses.dataclass(slots=True)
class Holding:
    """The pages of one process that may be merged, ascending."""

    pid: int
    numbers: npt.NDArray[np.int64]  # address // page size
    prints: Prints
    frames: npt.NDArray[np.uint64]  # 0 where no other process maps the page
    known: Flags  # a pool holds an equal page
    stretch: npt.NDArray[np.int64]  # as `twins.stretches` gives it
    huge: npt.NDArray[np.int64]  # numbers of the first pages of huge pages
    others: MergeReport  # pages that were not read: merged already, or refused

    def names(self, numbers: npt.NDArray[np.int64]) -> Prints | None:
        """Give the fingerprints of pages, ascending; None if some were not read."""
        at = np.searchsorted(self.numbers, numbers)
        if len(at) and at[-1] == len(self.numbers):
            return None
        return self.prints[at] if (self.numbers[at] == numbers).all() else None


def read(
    space: AddressSpace,
    seed: int,
    *,
    known: Lookup | None = None,
    pool: str | None = None,
    tell: Callable[[float], None] | None = None,
) -> Holding:
    """Read all pages of a process that may be merged.

    Args:
        space: whose memory.
        seed: of the fingerprints.
        known: finds the fingerprints that a store has, under that seed.
        pool: the name of that store's pool. Without, pages of any pool count as
            merged; with it those of others are read.
        tell: hears of every group of pages read, and how many they were.

    Raises:
        OSError: ESRCH or ENOENT when the process ended, EACCES or EPERM without
            leave to look at it.
    """
    return _Reading(space, seed, pool, tell).holding(known)


class _Reading:
    """One process being read."""

    def __init__(
        self,
        space: AddressSpace,
        seed: int,
        pool: str | None,
        tell: Callable[[float], None] | None,
    ) -> None:
        self._space, self._seed, self._pool = space, seed, pool
        self._tell = tell or (lambda _: None)
        self._numbers: list[npt.NDArray[np.int64]] = []
        self._prints: list[Prints] = []
        self._frames: list[npt.NDArray[np.uint64]] = []
        self._huge: list[int] = []
        self._others = MergeReport()

    def holding(self, known: Lookup | None) -> Holding:
        """Read it, mapping by mapping."""
        mappings = self._space.mappings(EVERYTHING)
        for mapping in mappings:
            if reason := pages.why_not(mapping, self._space.keeps):
                self._others.refuse(reason, self._resident(mapping))
            else:
                self._look(mapping)
        numbers = _joined(self._numbers, np.int64)
        prints = _joined(self._prints, np.uint64)
        in_pool = np.zeros(len(prints), bool)
        if known is not None:
            for first in range(0, len(prints), pages.BATCH_PAGES):
                part = slice(first, first + pages.BATCH_PAGES)
                in_pool[part] = known(prints[part])
        starts = np.array([m.span.start // PAGE_SIZE for m in mappings], np.int64)
        return Holding(
            self._space.pid,
            numbers,
            prints,
            _joined(self._frames, np.uint64),
            in_pool,
            stretches(numbers, starts),
            np.array(self._huge, np.int64),
            self._others,
        )

    def _resident(self, mapping: Mapping) -> int:
        table = self._space.pagemap()
        runs = pagemap.walk(table, mapping.span, Category.PRESENT)
        return sum(run.pages for run, kind in runs if kind & Category.PRESENT)

    def _look(self, mapping: Mapping) -> None:
        report, candidates = pages.survey(
            self._space, mapping, [mapping.span], self._pool
        )
        report.reasons.pop(pages.UNTOUCHED, 0)  # no memory yet
        self._others += report
        self._read(candidates)
        if candidates and mapping.span.size >= HUGE_SIZE:
            table = self._space.pagemap()
            for run, kind in pagemap.walk(table, mapping.span, Category.HUGE):
                if kind & Category.HUGE:
                    starts = range(run.start, run.stop, HUGE_SIZE)
                    self._huge += [start // PAGE_SIZE for start in starts]

    def _read(self, candidates: list[Span]) -> None:
        table = self._space.pagemap()
        for spans, prints in fingerprints_of(self._space, candidates, self._seed):
            if prints is None:
                self._others.refuse(VANISHED, sum(span.pages for span in spans))
                continue
            self._numbers.append(pages_of(spans))
            self._prints.append(prints)
            entries = entries_of(table, self._numbers[-1])
            self._frames.append(shared_frames(entries, self._numbers[-1]))
            self._tell(len(prints))


def fingerprints_of(
    space: AddressSpace, spans: Iterable[Span], seed: int, most: int = _GROUP_PAGES
) -> Iterator[tuple[list[Span], Prints | None]]:
    """Read pages in groups; gives each group's spans and fingerprints, in order.

    None instead where some page is gone. Little more than that page is given up.

    Raises:
        OSError: as `AddressSpace.read`, but for EFAULT.
    """
    for group in groups(spans, most):
        try:
            rows = space.read(group)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            if most <= _PART_PAGES:
                yield group, None
            else:
                yield from fingerprints_of(space, group, seed, _PART_PAGES)
        else:
            yield group, fingerprint(rows, seed)


def shared_frames(
    entries: npt.NDArray[np.uint64], numbers: npt.NDArray[np.int64]
) -> Prints:
    """Name the frame of each page that more than one page table shows; else 0.

    Only root is told frames' numbers. For others the page's number must do: pages
    are shared by fork nearly always, and then have the same one in each process.

    Args:
        entries: theirs in the page table, as `entries_of` gives them.
        numbers: of the pages, ascending.
    """
    alone = entries & np.uint64(pagemap.ENTRY_EXCLUSIVE) != 0
    alone |= entries & np.uint64(pagemap.ENTRY_PRESENT) == 0  # gone since
    frames = entries & np.uint64(pagemap.ENTRY_FRAME)
    frames = np.where(frames != 0, frames, numbers.astype(np.uint64))
    frames[alone] = 0
    return frames


def entries_of(table: int, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Read the table entries of pages, ascending, with as few calls as it takes."""
    cuts = np.flatnonzero(np.diff(numbers) > _ENTRIES_GAP) + 1
    found = [np.empty(0, np.uint64)]
    for some in np.split(numbers, cuts) if len(numbers) else ():
        start, stop = int(some[0]) * PAGE_SIZE, (int(some[-1]) + 1) * PAGE_SIZE
        found.append(pagemap.entries(table, Span(start, stop))[some - some[0]])
    return np.concatenate(found)


def _joined(parts: list[npt.NDArray[_T]], kind: type[_T]) -> npt.NDArray[_T]:
    return np.concatenate(parts) if parts else np.empty(0, kind)
