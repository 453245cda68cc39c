"""Comparing another process's pages with a pool's, from here."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from sksm.linux import libc
from sksm.process import Exchange
from sksm.spans import PAGE_SIZE

_PIECE_BYTES = 64 * PAGE_SIZE  # both sides stay in the cache
# Of addresses for a pool, of each process and grant: 256 GiB. What lies behind is read.
_VIEW_BYTES = 1 << 38


class Comparison:
    """One pool, beside the memory of one process.

    A thread of its own compares, one item after the other, while threads of the process
    are held for the pages before: the kernel and memcmp(3) work without the
    interpreter.

    Args:
        mem: an open /proc/PID/mem. Reading it pins nothing.
        pool: the pool's file.
    """

    def __init__(self, mem: int, pool: int) -> None:
        self._mem, self._pool = mem, pool
        self._far = np.zeros(_PIECE_BYTES, np.uint8)
        self._copy = np.zeros(_PIECE_BYTES, np.uint8)
        self._zeros = np.zeros(_PIECE_BYTES, np.uint8)
        self._executor = ThreadPoolExecutor(1)
        flags = libc.MAP_SHARED | libc.MAP_NORESERVE
        self._view = libc.mmap(None, _VIEW_BYTES, libc.PROT_READ, flags, pool, 0)

    def close(self) -> None:
        """Unmap the pool."""
        self._executor.shutdown()
        libc.munmap(self._view, _VIEW_BYTES)

    def begin(self, items: Sequence[Exchange]) -> Callable[[], list[bool]]:
        """Begin to compare; gives what waits for the end of it.

        That says which items' pages, but for their own ones, equal their twins. Pages
        that are gone equal nothing.
        """
        return self._executor.submit(lambda: list(map(self._equal, items))).result

    def _equal(self, item: Exchange) -> bool:
        copy = self._copy.ctypes.data
        # SAFETY: buffers of ours; the pool's file reaches as far as its slots, and
        # cannot shrink.
        return all(
            self._read(address, self._copy[:size])
            and (twin := self._twin(offset, size))
            and not libc.memcmp(copy, twin, size)
            for address, offset, size in _cut(item)
        )

    def _twin(self, offset: int | None, size: int) -> int:
        """Give the address of what lies in the pool, or of zeros; 0 if it does not."""
        if offset is None:
            return int(self._zeros.ctypes.data)
        if offset + size <= _VIEW_BYTES:
            return self._view + offset
        got = os.preadv(self._pool, [self._far[:size].data], offset)  # it stands alone
        return int(self._far.ctypes.data) if got == size else 0

    def _read(self, address: int, into: NDArray[np.uint8]) -> bool:
        try:
            return os.preadv(self._mem, [into.data], address) == len(into)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EFAULT):
                raise
            return False


def _cut(item: Exchange) -> Iterator[tuple[int, int | None, int]]:
    """Cut an item into pieces: address, offset in the pool, size."""
    edges = [0, *itertools.chain.from_iterable(item.own), item.span.pages]
    for first, stop in zip(edges[::2], edges[1::2], strict=True):
        for at in range(first * PAGE_SIZE, stop * PAGE_SIZE, _PIECE_BYTES):
            size = min(_PIECE_BYTES, stop * PAGE_SIZE - at)
            offset = None if item.slot is None else item.slot * PAGE_SIZE + at
            yield item.span.start + at, offset, size
