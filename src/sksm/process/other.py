"""The memory of another process."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from sksm.linux import calls, libc, maps, userfaultfd
from sksm.process import BUSY, CHANGED, DONE, EXCHANGE_PAGES, Exchange, guards
from sksm.process.allowance import Allowance
from sksm.process.foothold import Foothold, There
from sksm.process.reading import read_unpinned
from sksm.process.script import Script
from sksm.process.stopping import Threads
from sksm.process.watching import WriteWatch, open_there
from sksm.spans import PAGE_SIZE, Span

_MOST_AT_ONCE = 64  # exchanges in one stop
_PAUSES = (0.001, 0.01, 0.1)  # seconds before stopping it again, if it would not
UNPROTECTED = "it may be written to meanwhile (a file's private mapping)"
EVERYTHING = Span(0, 1 << 56)  # as far as five levels of page tables reach


class OtherProcess:
    """Another process's address space; see `AddressSpace`.

    Looking and reading leave the process alone. The first exchange puts a foothold
    into it, and the end of the block takes that out. It is an ordinary outcome that
    the process ends meanwhile: then everything raises `ProcessLookupError`.

    Everything happens in one thread of ours, since the kernel binds tracing to it.

    Raises:
        OSError: EACCES or EPERM without leave to trace it (ptrace(2)); ESRCH or
            ENOENT if there is no such process.
    """

    pinned = False

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._allowance = Allowance(pid)
        self._tables: dict[str, int] = {}
        self._threads = Threads(pid)
        self._foothold: Foothold | None = None
        self._pools: dict[int, int] = {}  # inode -> descriptor in the process
        self._uffd: tuple[int, int] | None = None  # in the process, and here
        self._protected = False
        self._watched: list[Span] = []  # by ourselves
        self._rows: npt.NDArray[np.uint8] | None = None

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._foothold:
            with contextlib.suppress(OSError):  # it ended, or cannot be stopped now
                self._foothold.leave()
        self._threads.close()
        for fd in self._tables.values():
            os.close(fd)
        self._tables.clear()

    def objection(self) -> str | None:
        """Say why nothing of this process may be merged."""
        return guards.objection(self.pid)

    def mappings(self, span: Span = EVERYTHING) -> list[maps.Mapping]:
        """List the mappings that meet `span`, ascending, with flags.

        Its text costs the kernel a walk of the page tables, 28 ms a GiB. What we
        have put there ourselves is left out.
        """
        ours = self._foothold.workspace if self._foothold else Span(0, 0)
        found = maps.mappings(self.pid, span)
        return [
            dataclasses.replace(mapping, flags=mapping.flags - {"uw"})
            if any((mapping.span & watched).pages for watched in self._watched)
            else mapping
            for mapping in found
            if not (mapping.span & ours).pages
        ]

    def count_mappings(self, span: Span = EVERYTHING) -> int:
        """Count the mappings that meet `span`."""
        if span == EVERYTHING:
            return maps.count(self.pid)
        return maps.count_within(self._table("maps"), span)

    def may_add_mappings(self, wanted: int) -> int:
        """Grant up to `wanted` more mappings, to a quarter of the limit."""
        return self._allowance.grant(wanted)

    def pagemap(self) -> int:
        """Give an open /proc/PID/pagemap."""
        return self._table("pagemap")

    def _table(self, name: str) -> int:
        if name not in self._tables:
            path = f"/proc/{self.pid}/{name}"
            self._tables[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._tables[name]

    def read(self, spans: Iterable[Span]) -> npt.NDArray[np.uint8]:
        """Copy whole pages out, one row a page; valid until the next time."""
        pieces = list(spans)
        pages = sum(piece.pages for piece in pieces)
        if self._rows is None or pages > len(self._rows):
            self._rows = np.empty((pages, PAGE_SIZE), np.uint8)
        return read_unpinned(self._table("mem"), pieces, self._rows)

    @property
    def stops(self) -> list[float]:
        """How long all threads were held, in seconds, each time."""
        return self._threads.stops

    @contextlib.contextmanager
    def watched(self, spans: Iterable[Span]) -> Iterator[WriteWatch]:
        """Note in the block which pages are written to; see `WriteWatch`."""
        watch = WriteWatch(self._established(), self.pagemap(), spans)
        self._watched = watch.spans
        try:
            yield watch
        finally:
            watch.end()
            self._watched = []

    @contextlib.contextmanager
    def protected(self, span: Span) -> Iterator[None]:
        """Make `exchange` able to hold off writers to `span`.

        Its threads are held during an exchange, too. But if we are killed then,
        they run, and the stub is not yet at its end.

        Raises:
            OSError: EBUSY if another userfaultfd watches the memory; EOPNOTSUPP
                for memory that can be written to, and not be protected.
        """
        _, ours = self._userfaultfd()
        try:
            userfaultfd.register(ours, span)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if any(m.prot & libc.PROT_WRITE for m in self._now(span)):
                raise OSError(errno.EOPNOTSUPP, UNPROTECTED) from error
            yield  # nobody can write to it
            return
        self._protected = True
        try:
            yield
        finally:
            self._protected = False
            with contextlib.suppress(OSError):  # what was replaced is not registered
                userfaultfd.unregister(ours, span)

    def exchange(self, pool: int, exchanges: Sequence[Exchange]) -> list[int]:
        """Compare and replace, all threads held; see `AddressSpace.exchange`."""
        verdicts: list[int] = []
        for some in _slices(exchanges):
            verdicts += self._persist(pool, some)
        return verdicts

    def _persist(self, pool: int, exchanges: list[Exchange]) -> list[int]:
        for pause in _PAUSES:
            with contextlib.suppress(BlockingIOError):
                return self._exchange(pool, exchanges)
            self._threads.settle(pause)
        return [errno.EBUSY] * len(exchanges)

    def _exchange(self, pool: int, exchanges: list[Exchange]) -> list[int]:
        foothold = self._established()
        there = self._pool_there(pool)
        uffd = self._userfaultfd()[0] if self._protected else None
        home = There(foothold, everyone=True, check=lambda: self._check(exchanges))
        script = Script(home, there, uffd, foothold.stage)
        for item in exchanges:
            span = item.span
            at = 0 if item.slot is None else foothold.spare(span.size, span.start)
            script.add(item, at)
        try:
            verdicts = script.run()
        except _Rearranged:
            return [CHANGED] * len(exchanges)
        self._tidy(script.left_over)
        return verdicts

    def privatise(self, span: Span, prot: int) -> None:
        """Give `span` anonymous pages of its own that hold the same bytes.

        Raises:
            OSError: ENOMEM, EBUSY, and so on, with everything as it was.
        """
        for pause in _PAUSES:
            with contextlib.suppress(BlockingIOError), self.protected(span):
                return self._privatise(span, prot)
            self._threads.settle(pause)
        raise BlockingIOError(errno.EBUSY, BUSY)

    def _privatise(self, span: Span, prot: int) -> None:
        foothold = self._established()
        home = There(foothold, everyone=True)
        script = Script(home, -1, self._userfaultfd()[0], None)
        script.copy(span, foothold.spare(span.size, span.start), prot)
        (verdict,) = script.run()
        self._tidy(script.left_over)
        if verdict != DONE:
            raise OSError(verdict, f"un-merging {span}: {os.strerror(verdict)}")

    def _tidy(self, spans: list[Span]) -> None:
        """Unmap what was to replace pages that turned out to be different."""
        if spans:
            rows = calls.CallList(There(self._established()))
            for span in spans:
                rows.syscall("munmap", span.start, span.size)
            rows.run()

    def _check(self, exchanges: list[Exchange]) -> None:
        """See that the mappings are what they were when the exchange was planned."""
        for item in exchanges:
            for mapping in self._now(item.span):
                same = mapping.prot == item.prot and not mapping.shared
                if not same or mapping.anonymous != item.anonymous:
                    raise _Rearranged

    def _now(self, span: Span) -> list[maps.Mapping]:
        """List the mappings that meet `span`, without flags: fast."""
        table = self._table("maps")
        try:
            return list(maps.query(table, span))
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
        return [m for m in maps.every_mapping(self.pid) if (m.span & span).pages]

    # -- what has to be there

    def _established(self) -> Foothold:
        if self._foothold is None:
            foothold = Foothold(self._threads)
            foothold.establish()
            self._foothold = foothold
        return self._foothold

    def _pool_there(self, pool: int) -> int:
        inode = os.fstat(pool).st_ino
        if inode not in self._pools:
            self._pools[inode] = self._established().lend(pool)
        return self._pools[inode]

    def _userfaultfd(self) -> tuple[int, int]:
        """Give a userfaultfd of the process: its descriptor there, and ours."""
        if self._uffd is None:
            self._uffd = open_there(self._established(), 0)
        return self._uffd


class _Rearranged(Exception):
    """The mappings are not what they were."""


def _slices(exchanges: Sequence[Exchange]) -> Iterator[list[Exchange]]:
    """Cut a list into what may be done while all threads are held."""
    some: list[Exchange] = []
    room = EXCHANGE_PAGES
    for item in exchanges:
        if some and (item.span.pages > room or len(some) == _MOST_AT_ONCE):
            yield some
            some, room = [], EXCHANGE_PAGES
        some.append(item)
        room -= item.span.pages
    if some:
        yield some
