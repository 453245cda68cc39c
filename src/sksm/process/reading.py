"""Copying memory out of a process, this one or another, and into it."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from sksm.linux import libc
from sksm.spans import PAGE_SIZE, Span

IOV_MAX = 1024  # linux/uio.h


def read_pages(
    pid: int, spans: Iterable[Span], rows: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Copy the pages of `spans` out of process `pid`: shape (pages, PAGE_SIZE).

    Reading through the kernel costs a copy, and in exchange memory that is gone
    is an error and not a crash, in this process as in any other.

    Args:
        pid: whose memory.
        spans: which pages, in order.
        rows: where to put them, at least as many rows. Memory that was used before
            is twice as fast as new memory, which the kernel clears first.

    Raises:
        OSError: EFAULT if some page is not mapped, ESRCH if the process is gone,
            EPERM without leave to trace it.
    """
    pieces = list(spans)
    pages = sum(piece.pages for piece in pieces)
    if rows is None:
        rows = np.empty((pages, PAGE_SIZE), np.uint8)
    rows = rows[:pages]
    at = rows.ctypes.data
    for first in range(0, len(pieces), IOV_MAX):
        some = pieces[first : first + IOV_MAX]
        at += _read_some(pid, some, at)
    return rows


def read_unpinned(
    mem: int, spans: Iterable[Span], rows: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """Copy the pages of `spans` out of a process and leave it as it is.

    `process_vm_readv` pins what it reads, and since Linux 5.19 the kernel copies
    an anonymous page before it is pinned if fork shares it (FAULT_FLAG_UNSHARE in
    mm/gup.c): to read forked workers would multiply their memory. A read of
    /proc/PID/mem pins nothing, and is nearly as fast.

    Args:
        mem: an open /proc/PID/mem.
        spans: which pages, in order.
        rows: where to put them, at least as many rows.

    Raises:
        OSError: EFAULT if some page is not mapped, ESRCH if the process is gone,
            or runs another program since `mem` was opened.
    """
    at = 0
    for span in spans:
        into = rows[at : at + span.pages]
        try:
            got = os.preadv(mem, [into.data], span.start)
        except OSError as error:
            if error.errno != errno.EIO:  # the first page cannot be read
                raise
            got = -1
        if got == 0:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        if got != span.size:
            raise OSError(errno.EFAULT, f"/proc/PID/mem: {os.strerror(errno.EFAULT)}")
        at += span.pages
    return rows[:at]


def read_bytes(pid: int, address: int, size: int) -> bytes:
    """Copy bytes out of process `pid`; errors as `read_pages`."""
    data = ctypes.create_string_buffer(size)
    _copy(libc.process_vm_readv, pid, address, data)
    return data.raw


def write_bytes(pid: int, address: int, data: bytes) -> None:
    """Copy bytes into process `pid`, where it may write; errors as `read_pages`."""
    _copy(
        libc.process_vm_writev,
        pid,
        address,
        ctypes.create_string_buffer(data, len(data)),
    )


def _copy(
    call: Callable[..., int], pid: int, address: int, data: ctypes.Array[ctypes.c_char]
) -> None:
    size = len(data)
    here = libc.iovec(ctypes.addressof(data), size)
    there = libc.iovec(address, size)
    # SAFETY: `here` is the whole of `data`.
    if call(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) != size:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def _read_some(pid: int, spans: list[Span], into: int) -> int:
    wanted = sum(span.size for span in spans)
    remote = (libc.iovec * len(spans))(
        *(libc.iovec(span.start, span.size) for span in spans)
    )
    local = libc.iovec(into, wanted)
    # SAFETY: `into` is the start of at least `wanted` bytes that the caller owns.
    got = libc.process_vm_readv(
        pid, ctypes.byref(local), 1, ctypes.byref(remote), len(spans), 0
    )
    if got != wanted:  # the kernel stops at the first page it cannot read
        raise OSError(errno.EFAULT, f"process_vm_readv: {os.strerror(errno.EFAULT)}")
    return wanted
