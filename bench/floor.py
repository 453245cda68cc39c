"""The least that merging can cost, by hand: each byte looked at once, one mmap.

No index, no search, no daemon, and nobody who might write meanwhile is held off:
the twin is known, and mapped here with its page tables filled.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from bench import memory
from bench.memory import Words
from bench.results import Wrong
from sksm.linux import libc
from sksm.spans import PAGE_SIZE

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.restype = ctypes.c_int
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_WRITE_BYTES = 1 << 30  # of one pwrite, which takes 2 GiB at most


class Pool:
    """A memfd of random pages, mapped here and with its page tables filled."""

    def __init__(self, size: int, seed: int) -> None:
        self.fd = os.memfd_create("bench-pool")
        os.ftruncate(self.fd, size)
        self._mapping = mmap.mmap(self.fd, size)
        self.words: Words = np.frombuffer(self._mapping, np.uint64)
        memory.fill(self.words, seed)

    def cover(self, array: Words) -> None:
        """Compare `array` with the pool's beginning and map that in its place."""
        if not equal(array, self.words[: len(array)]):
            raise Wrong("the floor was given unequal pages")
        map_over(array, self.fd)

    def cover_but(self, array: Words, step: int) -> None:
        """Do so although the last of every `step` pages has bytes of its own."""
        here, there = array.ctypes.data, self.words.ctypes.data
        run = (step - 1) * PAGE_SIZE
        for at in range(0, array.nbytes - run, step * PAGE_SIZE):
            if _memcmp(here + at, there + at, run):
                raise Wrong("the floor was given unequal pages")
        rows = array.reshape(-1, PAGE_SIZE // 8)
        own = rows[step - 1 :: step].copy()
        map_over(array, self.fd)
        rows[step - 1 :: step] = own


def of_one_page(pool: Pool, page: Words) -> Callable[[], None]:
    """Prepare the compare-and-map of one page: two calls, addresses at hand."""
    here, there = page.ctypes.data, pool.words.ctypes.data
    prot = libc.PROT_READ | libc.PROT_WRITE
    flags = libc.MAP_PRIVATE | libc.MAP_FIXED

    def cover() -> None:
        if _memcmp(here, there, PAGE_SIZE):
            raise Wrong("the floor was given unequal pages")
        # SAFETY: as `map_over`; the closure holds the page.
        libc.mmap(here, PAGE_SIZE, prot, flags, pool.fd, 0)

    return cover


def equal(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Compare two arrays of one size byte by byte, in one go."""
    return bool(_memcmp(one.ctypes.data, other.ctypes.data, one.nbytes) == 0)


def map_over(array: npt.NDArray[Any], fd: int) -> None:
    """Put a private mapping of the beginning of a file over an array."""
    # SAFETY: whole pages of an array that nobody else uses; bytes as before.
    libc.mmap(
        array.ctypes.data,
        array.nbytes,
        libc.PROT_READ | libc.PROT_WRITE,
        libc.MAP_PRIVATE | libc.MAP_FIXED,
        fd,
        0,
    )


def store(array: Words) -> int:
    """Name every page, write all into a fresh memfd, map that in their place.

    Returns:
        The memfd, which the caller closes.
    """
    rows = array.view(np.uint8).reshape(-1, PAGE_SIZE)
    name: Callable[[Any], int] = xxhash.xxh3_64_intdigest
    np.fromiter(map(name, rows), np.uint64, len(rows))
    fd = os.memfd_create("bench-pool")
    os.ftruncate(fd, array.nbytes)
    left, offset = array.data.cast("B"), 0
    while left:
        done = os.pwrite(fd, left[:_WRITE_BYTES], offset)
        left, offset = left[done:], offset + done
    map_over(array, fd)
    return fd
