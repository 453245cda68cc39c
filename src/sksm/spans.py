"""Page-aligned ranges of addresses."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterable, Iterator

PAGE_SIZE = mmap.PAGESIZE
HUGE_SIZE = 2 << 20  # a huge page's, and what one page table of small ones covers


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Span:
    """The addresses `start <= a < stop` of one address space, whole pages only.

    A span is a pair of numbers. It does not say whose memory it means; only an
    `AddressSpace` can turn it into bytes.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.start % PAGE_SIZE or self.stop % PAGE_SIZE or self.start > self.stop:
            raise ValueError(f"not a page-aligned range: {self}")

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.stop:#x}"

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.stop - self.start

    @property
    def pages(self) -> int:
        """How many pages the span covers."""
        return (self.stop - self.start) // PAGE_SIZE

    def __and__(self, other: Span) -> Span:
        """Intersect; an empty span where the two do not meet."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))


def groups(spans: Iterable[Span], pages: int) -> Iterator[list[Span]]:
    """Cut spans into groups of so many pages each; the last may have fewer."""
    group: list[Span] = []
    room = pages * PAGE_SIZE
    for span in spans:
        start = span.start
        while start < span.stop:
            group.append(Span(start, min(span.stop, start + room)))
            room -= group[-1].size
            start = group[-1].stop
            if not room:
                yield group
                group, room = [], pages * PAGE_SIZE
    if group:
        yield group


def whole_pages(address: int, length: int) -> Span:
    """Cover the pages that lie wholly inside `length` bytes at `address`."""
    start = -(-address // PAGE_SIZE) * PAGE_SIZE
    stop = (address + length) // PAGE_SIZE * PAGE_SIZE
    return Span(start, max(start, stop))
