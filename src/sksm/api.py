"""The library's calls."""

from __future__ import annotations

import dataclasses
import math
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from sksm import buffers, pages, session
from sksm.daemon.client import RemoteStore
from sksm.errors import DaemonUnreachable
from sksm.linux import maps
from sksm.report import MergeReport
from sksm.spans import PAGE_SIZE, Span


def merge(obj: object) -> MergeReport:
    """Share every page of an object with all equal pages offered before.

    The object's bytes do not change, and it can be used, written and freed as
    before; a write gives the page written to a private copy again. Offer what
    stays as it is: the call takes the pages in their current state, once.

    Args:
        obj: anything with contiguous memory: numpy array or view, bytes,
            bytearray, memoryview, mmap, Arrow buffer, torch tensor. Pages that
            are not wholly inside it are left alone; `empty` and `asarray` make
            arrays that begin on a page.

    Returns:
        What became of each page. A page that could not be merged is counted in
        `refused`, and `reasons` says why; it is no error.

    Raises:
        TypeError: `obj` has no buffer.
        ValueError: its memory is not contiguous, or it has none.
        SksmError: what stood in the way, and what would help.
    """
    buffer = buffers.locate(obj)
    span = buffer.span
    report = MergeReport()
    report.refuse(buffers.PARTLY_OUTSIDE, buffer.partial_pages)
    report.refuse(buffers.FIRST_PAGE, buffer.kept_pages)
    if buffer.risk:
        report.refuse(buffer.risk, span.pages)
    elif span.pages:
        report += session.current.merge(
            span, pinned=True, never_drops=buffer.never_drops
        )
    return report


def merge_range(address: int, length: int) -> MergeReport:
    """Merge the pages of a raw range, as `madvise(address, length, MADV_MERGE)`.

    `unmerge_range` it before a mapping in it is grown with `mremap`, and before
    memory that malloc gave out is freed, unless the allocator is one that never
    expects dropped pages to read as zeros.

    Args:
        address: start of the range, a multiple of the page size.
        length: bytes, a multiple of the page size. Zero does nothing.

    Raises:
        ValueError: `address` or `length` is not a whole number of pages.
        OSError: ENOMEM if part of the range is not mapped; the rest was merged.
        SksmError: what stood in the way, and what would help.
    """
    span = _span(address, length)
    if not length:
        return MergeReport()
    return session.current.merge(span, pinned=False)


def unmerge(obj: object) -> int:
    """Give the pages of an object private memory of their own again.

    Returns:
        Bytes that are no longer shared.

    Raises:
        TypeError, ValueError: as `merge`.
        SksmError: there is not enough memory; everything is as it was.
    """
    return session.current.unmerge(buffers.locate(obj).span)


def unmerge_range(address: int, length: int) -> int:
    """Give the merged pages of a raw range private memory of their own again."""
    return session.current.unmerge(_span(address, length))


def empty(shape: int | tuple[int, ...], dtype: npt.DTypeLike = float) -> Any:
    """Make an array that begins on a page, its contents undefined (zeros).

    Equal arrays at different offsets within a page share nothing: pages are
    equal or not as a whole.
    """
    kind = np.dtype(dtype)
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(sizes)
    # A page before and a page behind, never touched: the first of an mmap and the
    # last of a mapping are not merged.
    pages_needed = -(-count * kind.itemsize // PAGE_SIZE) + 2
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = buffers.Pages(-1, pages_needed * PAGE_SIZE, flags=flags)
    return np.frombuffer(memory, kind, count, offset=PAGE_SIZE).reshape(sizes)


def asarray(obj: Any) -> Any:
    """Give `obj` as an array that begins on a page; a copy unless it does already."""
    array = np.asarray(obj)
    if array.flags.c_contiguous and array.ctypes.data % PAGE_SIZE == 0:
        return array
    copy = empty(array.shape, array.dtype)
    copy[...] = array
    return copy


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """What this process shares, and what its daemon holds. Sizes in bytes."""

    shared_here_bytes: int  # pages of this process mapped from a pool
    daemon_pid: int | None  # None: no daemon runs, and all else is zero
    clients: int = 0
    slots: int = 0  # different pages in the pool
    pool_bytes: int = 0
    index_bytes: int = 0
    daemon_bytes: int = 0  # its own memory, without the pool


def stats() -> Stats:
    """Say what is shared now. Starts no daemon.

    Raises:
        SksmError: the daemon that runs does not answer.
    """
    here = sum(m.span.size for m in maps.every_mapping("self") if pages.is_pool(m))
    try:
        store = RemoteStore(start=False)
    except (DaemonUnreachable, ConnectionError):  # the latter: it is just leaving
        return Stats(here, None)
    try:
        status = store.status()
    finally:
        store.close()
    return Stats(
        shared_here_bytes=here,
        daemon_pid=status.pid,
        clients=status.clients - 1,
        slots=status.slots,
        pool_bytes=status.pool_bytes,
        index_bytes=status.index_bytes,
        daemon_bytes=status.own_bytes,
    )


def _span(address: int, length: int) -> Span:
    for name, value in (("address", address), ("length", length)):
        if value % PAGE_SIZE or value < 0:
            raise ValueError(
                f"{name} {value:#x} is not a multiple of the page size {PAGE_SIZE}"
            )
    return Span(address, address + length)
