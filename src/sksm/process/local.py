"""The memory of this process."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from sksm.linux import calls, libc, maps
from sksm.process import DONE, Exchange, flags, guards
from sksm.process.allowance import Allowance
from sksm.process.procfiles import ProcFiles
from sksm.process.protection import protection
from sksm.process.reading import read_pages
from sksm.process.scratch import Scratch
from sksm.process.script import Script
from sksm.spans import PAGE_SIZE, Span


class ThisProcess:
    """The address space we run in.

    Args:
        pinned: the caller sees to it that the memory offered stays mapped (an
            object of the interpreter does that by exporting its buffer). Without,
            every comparison goes through the kernel, so that memory freed
            meanwhile is an outcome and not a crash.
        never_drops: see `AddressSpace`.
    """

    def __init__(self, *, pinned: bool = False, never_drops: bool = False) -> None:
        self.pid = os.getpid()
        self.pinned, self.tails, self.never_drops = pinned, False, never_drops
        self.keeps: frozenset[str] = frozenset()
        self._files = ProcFiles("self")
        self._uffd: int | None = None
        self._rows: npt.NDArray[np.uint8] | None = None

    def __enter__(self) -> ThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def objection(self) -> str | None:
        """Say why nothing of this process may be merged."""
        return guards.objection("self") or _locks_all()

    def mappings(self, span: Span) -> list[maps.Mapping]:
        """List the mappings that meet `span`, ascending."""
        found = flags.query(self._files["maps"], span)
        if found is not None and not _has_shadow_stacks():
            found = flags.with_flags(found, span, calls.Here())
        return maps.mappings("self", span) if found is None else found

    def count_mappings(self, span: Span) -> int:
        """Count the mappings that meet `span`."""
        return maps.count_within(self._files["maps"], span)

    def may_add_mappings(self, wanted: int) -> int:
        """Grant up to `wanted` more mappings, to a quarter of the limit."""
        return _allowance.grant(wanted)

    def pagemap(self) -> int:
        """Give an open /proc/self/pagemap."""
        return self._files["pagemap"]

    def read(self, spans: Iterable[Span]) -> npt.NDArray[np.uint8]:
        """Copy whole pages out, one row a page; valid until the next time."""
        pieces = list(spans)
        pages = sum(piece.pages for piece in pieces)
        if self._rows is None or pages > len(self._rows):
            self._rows = np.empty((pages, PAGE_SIZE), np.uint8)
        return read_pages(self.pid, pieces, self._rows)

    @contextlib.contextmanager
    def protected(self, span: Span) -> Iterator[None]:
        """Make `exchange` able to hold off writers to `span`, if the kernel can."""
        with protection(span) as uffd:
            self._uffd = uffd
            try:
                yield
            finally:
                self._uffd = None

    def exchange(self, pool: int, exchanges: Sequence[Exchange]) -> list[int]:
        """Compare and replace; see `AddressSpace.exchange`."""
        with Scratch(exchanges) as scratch:
            stage = None if self.pinned else scratch.stage
            script = Script(calls.Here(), pool, self._uffd, stage)
            for at, item in enumerate(exchanges):
                script.add(item, scratch.addresses[at])
            scratch.unsure = True
            verdicts = script.run()
            scratch.moved = [
                verdict == DONE and item.slot is not None
                for verdict, item in zip(verdicts, exchanges, strict=True)
            ]
            scratch.unsure = False
        return verdicts

    def advise(self, spans: Sequence[Span], advice: int) -> list[int]:
        """Give the kernel an advice; see `AddressSpace.advise`."""
        return [_advised(span, advice) for span in spans]

    def privatise(self, span: Span, prot: int) -> None:
        """Give `span` anonymous pages of its own that hold the same bytes.

        Raises:
            OSError: ENOMEM, with everything as it was.
        """
        spare = libc.mmap(None, span.size, libc.PROT_READ | libc.PROT_WRITE, *_ANON)
        ours = True  # until the list runs: then mremap may have given it away
        # SAFETY: unmapped only while it is ours for sure, as in Scratch.
        try:
            with self.protected(span):
                script = Script(calls.Here(), -1, self._uffd, None)
                script.copy(span, spare, prot)
                ours = False
                verdict = script.run()[0]
                ours = verdict != DONE
        finally:
            if ours:
                libc.munmap(spare, span.size)
        if verdict != DONE:
            raise OSError(verdict, f"un-merging {span}: {os.strerror(verdict)}")


@functools.cache  # libc turns them on before the program starts, or not at all
def _has_shadow_stacks() -> bool:
    return flags.have_shadow_stacks("self")


LOCKS_ALL = (
    "all memory that is mapped is locked at once (mlockall with MCL_FUTURE): "
    "munlockall() first"
)


def _locks_all() -> str | None:
    """Say so if the kernel locks what is mapped from now on: mlockall(2).

    It would lock the pool's pages, and may refuse to map them (EAGAIN). The flag is
    shown nowhere but by a new mapping: msync(2) refuses to invalidate locked memory.
    """
    try:
        page = libc.mmap(None, PAGE_SIZE, libc.PROT_NONE, *_ANON)
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise
        return LOCKS_ALL
    # SAFETY: just mapped, and nobody else's.
    try:
        libc.msync(page, PAGE_SIZE, libc.MS_INVALIDATE)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return LOCKS_ALL
    finally:
        libc.munmap(page, PAGE_SIZE)
    return None


def _advised(span: Span, advice: int) -> int:
    try:
        # SAFETY: the advice keeps contents, whoever owns the memory.
        libc.madvise(span.start, span.size, advice)
    except OSError as error:
        return error.errno or errno.EINVAL
    return DONE


_allowance = Allowance("self")
_ANON = (libc.MAP_PRIVATE | libc.MAP_ANONYMOUS, -1, 0)
