"""Pages of this process, as rows of bytes that a test knows."""

import mmap

import numpy as np

from sksm.spans import PAGE_SIZE, Span


def content(seed, pages):
    """Give `pages` pages of bytes that depend on `seed` only, none of them zero."""
    generator = np.random.default_rng(seed)
    return generator.integers(1, 256, (pages, PAGE_SIZE), np.uint8)


class Memory:
    """Pages of this process: a span, their bytes as a matrix, their frames."""

    def __init__(self, pages: int) -> None:
        # One page before and one behind: the first of an mmap and the last of a
        # mapping are not merged.
        size = (pages + 2) * PAGE_SIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.mmap = mmap.mmap(-1, size, flags=flags)
        self.rows = np.frombuffer(self.mmap, np.uint8).reshape(-1, PAGE_SIZE)
        self.rows = self.rows[1:-1]
        start = self.rows.ctypes.data
        self.span = Span(start, start + pages * PAGE_SIZE)

    @property
    def address(self) -> int:
        return self.span.start
