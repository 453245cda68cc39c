"""Whose memory it is. One interface, so that remote work is local work."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sksm.linux.maps import Mapping
from sksm.spans import PAGE_SIZE, Span

# The most pages one exchange should have: 2 MiB fit the caches and one page table,
# and who waits to write to them, or is stopped meanwhile, waits no longer than they
# take.
EXCHANGE_PAGES = 512

# What `AddressSpace.exchange` says of one exchange besides an errno.
DONE, CHANGED = 0, -1
BUSY = "a thread of it could not be stopped in time"  # what EBUSY means there


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """One mapping's worth of pages, and the equal pages to put in their place.

    `slot` is the pool page for the first of them, the rest follow on; None means
    the kernel's zero page. The pages in `own` (pairs of page offsets, first and
    behind the last) keep their own bytes although the mapping covers them.
    """

    span: Span
    prot: int
    slot: int | None
    own: tuple[tuple[int, int], ...] = ()
    anonymous: bool = True  # dropping a page of it makes it read as zeros
    not_forked: bool = False  # a child does not get it (MADV_DONTFORK), and never will
    apart: bool = (
        False  # must not join its neighbours' mapping, so that that cannot grow
    )


class AddressSpace(Protocol):
    """One process's memory: look at it, read it, exchange equal pages in it.

    Addresses handed in or out mean something in this space only. Nothing
    outside `sksm.process` turns an address into bytes.
    """

    pid: int
    # Last pages of mappings may be merged. Where what is offered ends, a mapping ends,
    # so that an object which ends there cannot be grown into the pool.
    tails: bool
    pinned: bool  # what is offered is one object's memory, and stays mapped
    # Whose memory it is drops no page of it (MADV_DONTNEED) and counts on zeros then.
    never_drops: bool
    keeps: frozenset[str]  # flags of a mapping that an exchange gives its successor

    def objection(self) -> str | None:
        """Say why nothing of it may be merged; None if something may."""
        ...

    def mappings(self, span: Span) -> list[Mapping]:
        """List the mappings that meet `span`, ascending."""
        ...

    def count_mappings(self, span: Span) -> int:
        """Count the mappings that meet `span`."""
        ...

    def may_add_mappings(self, wanted: int) -> int:
        """Grant up to `wanted` more mappings.

        At `vm.max_map_count` malloc fails too: a quarter of it is the limit, the
        program keeps the rest.
        """
        ...

    def pagemap(self) -> int:
        """Give an open /proc/PID/pagemap, closed with the space."""
        ...

    def read(self, spans: Iterable[Span]) -> npt.NDArray[np.uint8]:
        """Copy whole pages out, one row a page, in the order of `spans`.

        The rows are valid until the next call.

        Raises:
            OSError: EFAULT where some page is not mapped (any more).
        """
        ...

    def protected(self, span: Span) -> AbstractContextManager[None]:
        """Make `exchange` able to hold off writers to `span`, for a while."""
        ...

    def exchange(self, pool: int, exchanges: Sequence[Exchange]) -> list[int]:
        """Put equal pages in the place of others, each mapping wholly or not.

        The bytes are compared at a moment when neither side can change.

        Args:
            pool: a descriptor, in this process, of the pool's file.
            exchanges: what to put where. Their spans do not overlap.

        Returns:
            For each `DONE`; `CHANGED` where bytes differ (nothing happened); or
            the errno with which the kernel refused (nothing happened either).
        """
        ...

    def advise(self, spans: Sequence[Span], advice: int) -> list[int]:
        """Give the kernel an advice for spans (madvise(2)) that keeps their contents.

        Returns:
            For each span `DONE`, or the errno with which the kernel refused.
        """
        ...


def pages_of(spans: Iterable[Span]) -> npt.NDArray[np.int64]:
    """List the page numbers (address // page size) of `spans`, in order."""
    numbers = [
        np.arange(span.start // PAGE_SIZE, span.stop // PAGE_SIZE) for span in spans
    ]
    return np.concatenate(numbers) if numbers else np.empty(0, np.int64)


def within(
    numbers: npt.NDArray[np.int64], spans: Iterable[Span]
) -> npt.NDArray[np.bool_]:
    """Say which of ascending page numbers lie in `spans`."""
    flags = np.zeros(len(numbers), bool)
    for span in spans:
        first, stop = np.searchsorted(
            numbers, [span.start // PAGE_SIZE, span.stop // PAGE_SIZE]
        )
        flags[first:stop] = True
    return flags


def spans_of(numbers: npt.NDArray[np.int64]) -> list[Span]:
    """Cover pages, numbers ascending, with the fewest spans."""
    if not len(numbers):
        return []
    edges = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
    bounds = itertools.pairwise([0, *edges, len(numbers)])
    return [
        Span(int(numbers[a]) * PAGE_SIZE, (int(numbers[b - 1]) + 1) * PAGE_SIZE)
        for a, b in bounds
    ]
