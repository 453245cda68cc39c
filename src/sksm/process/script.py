"""Exchanges in our own memory, written down as a call list."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sksm.linux import calls, libc, userfaultfd
from sksm.process import CHANGED, DONE, Exchange
from sksm.spans import PAGE_SIZE, Span

HUGE = 2 << 20  # a whole page table; mremap moves these without touching entries
_ZERO_BYTES = 1 << 20
_STAGE_PAGES = 64  # compared at a time when memory may vanish: half an L2 cache


class Scratch:
    """Addresses at which to build the mappings that will replace others.

    A mapping that moves leaves a hole, which belongs to whoever maps next; so
    the end unmaps exactly the pieces that did not move.
    """

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self.addresses: list[int] = []
        self.moved: list[bool] = []
        self.unsure = False  # the list may have run, and nobody knows what moved
        self._exchanges = exchanges
        stage = _STAGE_PAGES * PAGE_SIZE
        self._bytes = stage + sum(
            _room(item) for item in exchanges if item.slot is not None
        )

    def __enter__(self) -> Scratch:
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
        self._start = libc.mmap(None, self._bytes, libc.PROT_NONE, flags, -1, 0)
        self.stage = self._start
        rw = libc.PROT_READ | libc.PROT_WRITE
        # SAFETY: the first pages of what was just mapped.
        try:
            libc.mprotect(self.stage, _STAGE_PAGES * PAGE_SIZE, rw)
        except OSError:
            libc.munmap(self._start, self._bytes)
            raise
        at = self._start + _STAGE_PAGES * PAGE_SIZE
        for item in self._exchanges:
            self.addresses.append(_beside(at, item))
            at += _room(item) if item.slot is not None else 0
        return self

    def __exit__(self, *_: object) -> None:
        if self.unsure:  # Ctrl-C just then: better leave addresses behind than
            return  # unmap what another thread has mapped in the holes
        at = self._start
        moved = zip(self.addresses, self._exchanges, self.moved, strict=False)
        for address, item, gone in moved:
            if gone:
                _unmap(at, address)
                at = address + item.span.size
        _unmap(at, self._start + self._bytes)


def _room(item: Exchange) -> int:
    return item.span.size + (HUGE if item.span.size >= HUGE else 0)


def _beside(at: int, item: Exchange) -> int:
    """Round `at` up so that whole page tables can move to the item's span."""
    if item.span.size < HUGE:
        return at
    return at + (item.span.start - at) % HUGE


def _unmap(start: int, stop: int) -> None:
    if start < stop:
        libc.munmap(start, stop - start)


class Script:
    """A call list that makes exchanges, and reads their verdicts from it."""

    def __init__(
        self, pool: int, uffd: int | None, pinned: bool, scratch: Scratch | None
    ) -> None:
        self._pool, self._uffd, self._pinned = pool, uffd, pinned
        self._scratch = scratch
        self._calls = calls.CallList()
        self._items: list[tuple[range, set[int]]] = []  # rows, those that compare
        self._held: list[Any] = []  # structures that rows name by address

    def add(self, item: Exchange, scratch: int) -> None:
        """Compare `item` with its twin and put the twin in its place."""
        comparisons: set[int] = set()
        with self._exclusive(item.span, comparisons):
            if item.slot is None:
                self._clear(item, comparisons)
            else:
                self._replace(item, item.slot, scratch, comparisons)
        if item.slot is None:  # map the zero page now: "already", next time
            where = (item.span.start, item.span.size)
            self._calls.syscall("madvise", *where, libc.MADV_POPULATE_READ)

    def copy(self, span: Span, spare: int, prot: int) -> None:
        """Copy `span` to `spare` and put that in its place."""
        with self._exclusive(span, set()):
            self._copy_pages(span.start, spare, np.array([[0, span.size]]))
            if prot != libc.PROT_READ | libc.PROT_WRITE:
                self._calls.syscall("mprotect", spare, span.size, prot)
            self._move(spare, span)

    def run(self) -> list[int]:
        """Carry out; give each item's verdict: `DONE`, `CHANGED` or an errno."""
        done = self._calls.run()
        return [_verdict(done, rows, compares) for rows, compares in self._items]

    @contextlib.contextmanager
    def _exclusive(self, span: Span, comparisons: set[int]) -> Iterator[None]:
        """Hold writers to `span` off while the rows added inside are worked off.

        Releasing a range that was replaced gives ENOENT: there is nothing left
        to release, and its writers only need waking.
        """
        first = len(self._calls)
        if self._uffd is None:
            with self._calls.block():
                yield
            self._items.append((range(first, len(self._calls)), comparisons))
            return
        request = np.zeros(2, userfaultfd.WRITEPROTECT)
        request["start"], request["len"] = span.start, span.size
        request["mode"][0] = userfaultfd.UFFDIO_WRITEPROTECT_MODE_WP
        on, off = request.ctypes.data, request.ctypes.data + request.itemsize
        self._held.append(request)
        ioctl = self._calls.syscall
        with self._calls.block():
            ioctl("ioctl", self._uffd, userfaultfd.UFFDIO_WRITEPROTECT, on)
            yield
        self._items.append((range(first, len(self._calls)), comparisons))
        ioctl("ioctl", self._uffd, userfaultfd.UFFDIO_WRITEPROTECT, off)
        ioctl("ioctl", self._uffd, userfaultfd.UFFDIO_WAKE, off)

    def _replace(self, item: Exchange, slot: int, at: int, compares: set[int]) -> None:
        flags = libc.MAP_PRIVATE | libc.MAP_FIXED
        rw = libc.PROT_READ | libc.PROT_WRITE
        prot = item.prot if not item.own else rw | item.prot
        offset = slot * PAGE_SIZE
        self._calls.syscall(
            "mmap", at, item.span.size, prot, flags, self._pool, offset, want=at
        )
        if item.own:
            self._copy_pages(item.span.start, at, np.array(item.own) * PAGE_SIZE)
        self._compare(item.span.start, at, item.span.size, compares)
        if prot != item.prot:
            self._calls.syscall("mprotect", at, item.span.size, item.prot)
        self._move(at, item.span)

    def _clear(self, item: Exchange, compares: set[int]) -> None:
        start, size = item.span.start, item.span.size
        for at in range(0, size, _ZERO_BYTES):
            piece = min(_ZERO_BYTES, size - at)
            self._compare(start + at, _zeros(), piece, compares)
        if item.anonymous:
            self._calls.syscall("madvise", start, size, libc.MADV_DONTNEED)
        else:
            flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_FIXED
            self._calls.syscall(
                "mmap", start, size, item.prot, flags, -1, 0, want=start
            )

    def _compare(self, here: int, there: int, size: int, compares: set[int]) -> None:
        memcmp = libc.address_of("memcmp")
        if self._pinned or self._scratch is None:
            compares.add(self._calls.call(memcmp, here, there, size))
            return
        stage = self._scratch.stage
        for at in range(0, size, _STAGE_PAGES * PAGE_SIZE):
            piece = min(_STAGE_PAGES * PAGE_SIZE, size - at)
            self._copy_pages(here + at, stage, np.array([[0, piece]]))
            compares.add(self._calls.call(memcmp, stage, there + at, piece))

    def _copy_pages(
        self, source: int, target: int, pieces: npt.NDArray[np.int64]
    ) -> None:
        """Copy pieces (first byte, and behind the last) of one range to another.

        By way of the kernel: memory that is gone is EFAULT, not a crash.
        """
        sizes = pieces[:, 1] - pieces[:, 0]
        vectors = np.empty((2, len(pieces), 2), "<u8")  # struct iovec: base, length
        vectors[0, :, 0] = target + pieces[:, 0]
        vectors[1, :, 0] = source + pieces[:, 0]
        vectors[:, :, 1] = sizes
        self._held.append(vectors)
        into, out_of = (side.ctypes.data for side in vectors)
        self._calls.syscall(
            "process_vm_readv",
            *(os.getpid(), into, len(pieces), out_of, len(pieces), 0),
            want=int(sizes.sum()),
        )

    def _move(self, at: int, span: Span) -> None:
        flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED
        self._calls.syscall(
            "mremap", at, span.size, span.size, flags, span.start, want=span.start
        )


def _verdict(done: calls.Results, rows: range, comparisons: set[int]) -> int:
    """Read the outcome of one block: where it stopped says why."""
    last = max((row for row in rows if done.ran[row]), default=rows[0])
    if done.met[rows[-1]]:
        return DONE
    if last in comparisons:
        return CHANGED
    if done.results[last] < 0:
        return int(-done.results[last])
    return errno.EFAULT  # a copy that fell short


@functools.cache
def _zeros() -> int:
    """Give the address of `_ZERO_BYTES` zeros: pages nobody ever writes."""
    area = mmap.mmap(-1, _ZERO_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _held_for_ever.append(area)
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


_held_for_ever: list[object] = []
