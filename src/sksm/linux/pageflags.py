"""What the kernel knows of page frames: Documentation/admin-guide/mm/pagemap.rst."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os

import numpy as np
import numpy.typing as npt

from sksm.linux import pagemap
from sksm.spans import PAGE_SIZE, Span

_FLAGS, _COUNTS = "/proc/kpageflags", "/proc/kpagecount"
KSM, ZERO_PAGE = 1 << 21, 1 << 24  # include/uapi/linux/kernel-page-flags.h
_GAP = 64  # frames: to read as many more words is cheaper than a call


def of_frames(frames: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Read the flags of frames by number, any order: 64 bits each.

    Raises:
        OSError: EACCES, EPERM without CAP_SYS_ADMIN; ENOENT without
            CONFIG_PROC_PAGE_MONITOR.
    """
    return _words(_FLAGS, frames)


def counts(frames: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Read how many page table entries show each frame; errors as `of_frames`."""
    return _words(_COUNTS, frames)


@functools.cache
def tell_ksm() -> bool:
    """Say whether `KSM` is set for KSM's pages only.

    Linux 6.12 sets it for every anonymous page. So a page of our own is looked at,
    which nobody has merged.

    Raises:
        OSError: as `of_frames`.
    """
    with mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE) as page:
        page[:8] = os.urandom(8)
        view = ctypes.c_char.from_buffer(page)
        start = ctypes.addressof(view)
        table = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            entry = pagemap.entries(table, Span(start, start + PAGE_SIZE))
        finally:
            os.close(table)
            del view
    frame = entry & np.uint64(pagemap.ENTRY_FRAME)
    return not int(of_frames(frame)[0]) & KSM


def _words(path: str, frames: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    numbers, places = np.unique(frames.astype(np.int64), return_inverse=True)
    if not len(numbers):
        return np.empty(0, np.uint64)
    found = []
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > _GAP) + 1):
            words = np.zeros(int(run[-1] - run[0]) + 1, "<u8")
            os.preadv(fd, [words.data.cast("B")], int(run[0]) * words.itemsize)
            found.append(words[run - run[0]])
    finally:
        os.close(fd)
    return np.concatenate(found)[places]
