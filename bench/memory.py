"""Buffers to merge, their contents, and a machine that has its memory ready."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

import sksm
from bench.results import Skipped, Wrong
from sksm.linux import libc
from sksm.spans import PAGE_SIZE

Words = npt.NDArray[np.uint64]

HUGE = 2 << 20
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CHUNK_WORDS = 1 << 20


def buffer(size: int, *, huge: bool = False) -> Words:
    """Make an untouched array of `size` bytes, over small or over huge pages.

    What the kernel's setting for huge pages is plays no part: the array asks for
    the kind it wants.
    """
    if not huge:
        # With a page behind it: the last one of a mapping is never merged, and
        # advice on a part of a mapping makes a mapping of that part.
        room: Words = sksm.empty((size + PAGE_SIZE) // 8, np.uint64)
        advise(room, mmap.MADV_NOHUGEPAGE)
        return room[: size // 8]
    if huge_pages_setting() == "never":
        raise Skipped(f"huge pages are switched off in {_HUGE_PAGES}")
    room = sksm.empty((size + 2 * HUGE) // 8, np.uint64)
    advise(room, mmap.MADV_HUGEPAGE)
    first = -room.ctypes.data % HUGE // 8
    return room[first : first + size // 8]


def advise(array: npt.NDArray[Any], advice: int) -> None:
    """Give the kernel advice on the memory of a page-aligned array."""
    # SAFETY: the array's own pages; the advice used here changes no contents.
    libc.madvise(array.ctypes.data, array.nbytes, advice)


def fill(array: Words, seed: int) -> None:
    """Fill with random words, so that no two pages are alike: the same by seed.

    Pages that differ in their first bytes already: whoever has to order pages
    by content has it easy.
    """
    generator = np.random.default_rng(seed)
    for first in range(0, len(array), _CHUNK_WORDS):
        part = array[first : first + _CHUNK_WORDS]
        part[:] = generator.integers(0, 2**64, len(part), dtype=np.uint64)


def huge_pages_setting() -> str:
    """Say when the kernel uses huge pages: always, madvise or never."""
    if not _HUGE_PAGES.exists():
        return "never"
    return _HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]


def huge_bytes(array: npt.NDArray[Any]) -> int:
    """Say how much of the mapping around `array` lies in huge pages."""
    address, inside = array.ctypes.data, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            start, _, stop = key.partition("-")
            inside = int(start, 16) <= address < int(stop, 16)
        elif inside and key == "AnonHugePages:":
            return int(rest.split()[0]) * 1024
    raise Wrong("the array's mapping is not in smaps")


def require_huge(array: npt.NDArray[Any]) -> None:
    """Make sure that the array lies in huge pages, nearly all of it.

    Raises:
        Skipped: the kernel had not enough of them.
    """
    if (found := huge_bytes(array)) < 0.9 * array.nbytes:
        raise Skipped(f"only {found} of {array.nbytes} bytes came in huge pages")


def count_mappings() -> int:
    """Count the mappings of this process."""
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def warm_up(size: int) -> None:
    """Touch `size` bytes and give them back.

    A virtual machine's memory is slow when it is touched for the first time,
    since its host has to find it first; that is nothing to measure.

    Raises:
        Skipped: so much memory is not available.
    """
    available = psutil.virtual_memory().available
    if available < size + (256 << 20):
        raise Skipped(f"needs {size} bytes of memory, and {available} are available")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, size, flags=flags).close()


def pages(array: npt.NDArray[Any]) -> int:
    """Count the pages of a page-aligned array."""
    return array.nbytes // PAGE_SIZE
