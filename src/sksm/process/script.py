"""Exchanges written down as a call list, for whichever process they happen in."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sksm.linux import calls, libc, userfaultfd
from sksm.process import BUSY, CHANGED, DONE, Exchange
from sksm.spans import PAGE_SIZE, Span

# Compared at a time when memory may vanish: half an L2 cache.
STAGE_BYTES = 64 * PAGE_SIZE


class Script:
    """A call list that makes exchanges, and reads their verdicts from it."""

    def __init__(
        self, home: calls.Home, pool: int, uffd: int | None, stage: int | None
    ) -> None:
        self._home, self._pool, self._uffd = home, pool, uffd
        self._stage = stage
        self._calls = calls.CallList(home)
        self._items: list[tuple[range, set[int]]] = []  # rows, those that compare
        self._built: list[tuple[int, Span]] = []  # row, and what it maps
        self.left_over: list[Span] = []  # of those, what did not move

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

    def copy(
        self, span: Span, spare: int, prot: int, *, not_forked: bool = False
    ) -> None:
        """Copy `span` to fresh pages at `spare`, and put those in its place."""
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | self._home.fixed
        rw = libc.PROT_READ | libc.PROT_WRITE
        with self._exclusive(span, set()):
            self._build(spare, span.size, rw, flags, -1, 0)
            self._copy_pages(span.start, spare, np.array([[0, span.size]]))
            if prot != rw:
                self._calls.syscall("mprotect", spare, span.size, prot)
            if not_forked:
                self._calls.syscall("madvise", spare, span.size, libc.MADV_DONTFORK)
            self._move(spare, span)

    def run(self) -> list[int]:
        """Carry out; give each item's verdict: `DONE`, `CHANGED` or an errno.

        Raises:
            BlockingIOError: a signal came between, and nothing was done.
        """
        done = self._calls.run()
        if self._items and not done.ran[0]:
            raise BlockingIOError(errno.EBUSY, BUSY)
        verdicts = [_verdict(done, rows, compares) for rows, compares in self._items]
        failed = [
            rows
            for (rows, _), verdict in zip(self._items, verdicts, strict=True)
            if verdict != DONE
        ]
        self.left_over = [
            span
            for row, span in self._built
            if done.met[row] and any(row in rows for rows in failed)
        ]
        return verdicts

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
        on = self._home.place(request)
        off = on + request.itemsize
        ioctl = self._calls.syscall
        with self._calls.block():
            ioctl("ioctl", self._uffd, userfaultfd.UFFDIO_WRITEPROTECT, on)
            yield
        self._items.append((range(first, len(self._calls)), comparisons))
        ioctl("ioctl", self._uffd, userfaultfd.UFFDIO_WRITEPROTECT, off)
        ioctl("ioctl", self._uffd, userfaultfd.UFFDIO_WAKE, off)

    def _replace(self, item: Exchange, slot: int, at: int, compares: set[int]) -> None:
        flags = libc.MAP_PRIVATE | self._home.fixed
        rw = libc.PROT_READ | libc.PROT_WRITE
        prot = item.prot if not item.own else rw | item.prot
        offset = slot * PAGE_SIZE
        self._build(at, item.span.size, prot, flags, self._pool, offset)
        if item.own:
            self._copy_pages(item.span.start, at, np.array(item.own) * PAGE_SIZE)
        self._compare(item.span.start, at, item.span.size, compares)
        if prot != item.prot:
            self._calls.syscall("mprotect", at, item.span.size, item.prot)
        if item.not_forked:
            self._calls.syscall("madvise", at, item.span.size, libc.MADV_DONTFORK)
        if item.apart:  # mappings whose flags differ are not joined
            self._calls.syscall("madvise", at, item.span.size, libc.MADV_NOHUGEPAGE)
        self._move(at, item.span)

    def _build(self, at: int, size: int, *how: int) -> None:
        """Map what will be moved into place; `how` is the rest of mmap's arguments."""
        row = self._calls.syscall("mmap", at, size, *how, want=at)
        self._built.append((row, Span(at, at + size)))

    def _clear(self, item: Exchange, compares: set[int]) -> None:
        start, size = item.span.start, item.span.size
        for at in range(0, size, calls.ZEROS_BYTES):
            piece = min(calls.ZEROS_BYTES, size - at)
            self._compare(start + at, self._home.zeros, piece, compares)
        if item.anonymous:
            self._calls.syscall("madvise", start, size, libc.MADV_DONTNEED)
        else:
            flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_FIXED
            self._calls.syscall(
                "mmap", start, size, item.prot, flags, -1, 0, want=start
            )
            if item.not_forked:
                self._calls.syscall("madvise", start, size, libc.MADV_DONTFORK)

    def _compare(self, here: int, there: int, size: int, compares: set[int]) -> None:
        compare = self._home.compare
        if self._stage is None:
            compares.add(self._calls.call(compare, here, there, size))
            return
        for at in range(0, size, STAGE_BYTES):
            piece = min(STAGE_BYTES, size - at)
            self._copy_pages(here + at, self._stage, np.array([[0, piece]]))
            compares.add(self._calls.call(compare, self._stage, there + at, piece))

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
        into = self._home.place(vectors)
        out_of = into + vectors.nbytes // 2
        self._calls.syscall(
            "process_vm_readv",
            *(self._home.pid, into, len(pieces), out_of, len(pieces), 0),
            want=int(sizes.sum()),
        )

    def _move(self, at: int, span: Span) -> None:
        flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED
        self._calls.syscall(
            "mremap", at, span.size, span.size, flags, span.start, want=span.start
        )


class RemoteScript(Script):
    """One for pages that have been compared already, while nobody could write.

    Args:
        home: a process with a foothold.
        pool: descriptor there.
    """

    def __init__(self, home: calls.Home, pool: int) -> None:
        super().__init__(home, pool, None, None)

    def _replace(self, item: Exchange, slot: int, at: int, compares: set[int]) -> None:
        """Map the pool over the range in one call, if all of it is the pool's.

        What is more than that has to be done before a mapping takes its place: if part
        of it fails, everything is as it was.
        """
        if built_aside(item):
            super()._replace(item, slot, at, compares)
            return
        start, size = item.span.start, item.span.size
        how = (item.prot, libc.MAP_PRIVATE | libc.MAP_FIXED, self._pool)
        where = (start, size, *how, slot * PAGE_SIZE)
        self._calls.syscall("mmap", *where, want=start)

    def _compare(self, here: int, there: int, size: int, compares: set[int]) -> None:
        """Leave it: it has been done."""


def built_aside(item: Exchange) -> bool:
    """Say whether a mapping is made elsewhere in a process, and moved into place."""
    return bool(item.own or item.apart or item.not_forked)


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
