"""Comparing another process's pages with a pool's, from here."""

from __future__ import annotations

import errno
import itertools
import os

import numpy as np

from sksm.linux import libc
from sksm.process import Exchange
from sksm.spans import PAGE_SIZE

_PIECE_BYTES = 64 * PAGE_SIZE  # both sides stay in the cache
_VIEW_BYTES = 1 << 42  # of addresses for a pool: 4 TiB


class Comparison:
    """One pool, beside the memory of one process.

    Args:
        mem: an open /proc/PID/mem. Reading it pins nothing.
        pool: the pool's file.
    """

    def __init__(self, mem: int, pool: int) -> None:
        self._mem = mem
        self._copy = np.zeros(_PIECE_BYTES, np.uint8)
        self._zeros = np.zeros(_PIECE_BYTES, np.uint8)
        flags = libc.MAP_SHARED | libc.MAP_NORESERVE
        # Its pages are met again for each process, and mapped here once.
        self._view = libc.mmap(None, _VIEW_BYTES, libc.PROT_READ, flags, pool, 0)

    def close(self) -> None:
        """Unmap the pool."""
        libc.munmap(self._view, _VIEW_BYTES)

    def equal(self, item: Exchange) -> bool:
        """Say whether the pages of `item`, but for its own ones, equal their twins.

        Pages that are gone equal nothing.
        """
        edges = [0, *itertools.chain.from_iterable(item.own), item.span.pages]
        return all(
            self._equal(item, first * PAGE_SIZE, stop * PAGE_SIZE)
            for first, stop in zip(edges[::2], edges[1::2], strict=True)
        )

    def _equal(self, item: Exchange, first: int, stop: int) -> bool:
        copy = self._copy.ctypes.data
        there = self._zeros.ctypes.data
        for at in range(first, stop, _PIECE_BYTES):
            size = min(_PIECE_BYTES, stop - at)
            if not self._read(item.span.start + at, size):
                return False
            if item.slot is not None:
                there = self._view + item.slot * PAGE_SIZE + at
            # SAFETY: a buffer of ours; the pool's file reaches as far as its slots,
            # and cannot shrink.
            if libc.memcmp(copy, there, size):
                return False
        return True

    def _read(self, address: int, size: int) -> bool:
        try:
            return os.preadv(self._mem, [self._copy.data[:size]], address) == size
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EFAULT):
                raise
            return False
