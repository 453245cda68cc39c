"""Comparing another process's pages with a pool's, from here."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from sksm.linux import libc
from sksm.process import Exchange
from sksm.spans import PAGE_SIZE

_PIECE_BYTES = 64 * PAGE_SIZE  # both sides stay in the cache
_THREADS = 1
_VIEW_BYTES = 1 << 42  # of addresses for a pool: 4 TiB


class Comparison:
    """One pool, beside the memory of one process.

    Copying the process's pages takes longest, so two threads do it: the kernel and
    memcmp(3) work without the interpreter.

    Args:
        mem: an open /proc/PID/mem. Reading it pins nothing.
        pool: the pool's file.
    """

    def __init__(self, mem: int, pool: int) -> None:
        self._mem = mem
        self._own = threading.local()  # a buffer for each thread of ours
        self._zeros = np.zeros(_PIECE_BYTES, np.uint8)
        self._executor = ThreadPoolExecutor(_THREADS, initializer=self._prepare)
        flags = libc.MAP_SHARED | libc.MAP_NORESERVE
        # Its pages are met again for each process, and mapped here once.
        self._view = libc.mmap(None, _VIEW_BYTES, libc.PROT_READ, flags, pool, 0)

    def _prepare(self) -> None:
        self._own.copy = np.zeros(_PIECE_BYTES, np.uint8)

    def close(self) -> None:
        """Unmap the pool."""
        self._executor.shutdown()
        libc.munmap(self._view, _VIEW_BYTES)

    def begin(self, items: Sequence[Exchange]) -> Callable[[], list[bool]]:
        """Begin to compare; gives what waits for the end of it.

        That says which items' pages, but for their own ones, equal their twins. Pages
        that are gone equal nothing.
        """
        pieces = [(at, *piece) for at, item in enumerate(items) for piece in _cut(item)]
        parts = (pieces[first::_THREADS] for first in range(_THREADS))
        begun = [self._executor.submit(self._different, part) for part in parts]

        def equal() -> list[bool]:
            different = set().union(*(future.result() for future in begun))
            return [at not in different for at in range(len(items))]

        return equal

    def _different(self, pieces: list[tuple[int, int, int | None, int]]) -> set[int]:
        """Compare pieces (item, address, offset in the pool, size) one by one."""
        found: set[int] = set()
        copy: NDArray[np.uint8] = self._own.copy
        for at, address, offset, size in pieces:
            there = self._zeros.ctypes.data if offset is None else self._view + offset
            # SAFETY: a buffer of ours; the pool's file reaches as far as its slots,
            # and cannot shrink.
            if at not in found and (
                not self._read(address, copy[:size])
                or libc.memcmp(copy.ctypes.data, there, size)
            ):
                found.add(at)
        return found

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
