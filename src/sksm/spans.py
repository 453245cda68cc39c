"""Page-aligned ranges of addresses."""

from __future__ import annotations

import dataclasses
import mmap

PAGE_SIZE = mmap.PAGESIZE


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


def whole_pages(address: int, length: int) -> Span:
    """Cover the pages that lie wholly inside `length` bytes at `address`."""
    start = -(-address // PAGE_SIZE) * PAGE_SIZE
    stop = (address + length) // PAGE_SIZE * PAGE_SIZE
    return Span(start, max(start, stop))
