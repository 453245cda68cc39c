"""The memory of another process."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import errno
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from sksm.linux import calls, libc, maps, ptrace, userfaultfd
from sksm.process import BUSY, DONE, Exchange, flags, guards, status
from sksm.process.allowance import Allowance
from sksm.process.comparing import Comparison
from sksm.process.exchanging import Exchanging, Site
from sksm.process.foothold import Foothold
from sksm.process.procfiles import ProcFiles
from sksm.process.reading import read_unpinned
from sksm.process.stopping import Threads
from sksm.process.there import There
from sksm.process.watching import Barrier, WriteWatch
from sksm.spans import PAGE_SIZE, Span

UNPROTECTED = "it may be written to meanwhile (a file's private mapping)"
_MOST_ADVICES = 512  # rows of a call list
_MANY_PAGES = 1 << 15  # in memory: to go through more takes longer than trying
_MOST_TRIALS = 16  # mappings
EVERYTHING = Span(0, 1 << 56)  # as far as five levels of page tables reach


class OtherProcess:
    """Another process's address space; see `AddressSpace`.

    Looking and reading leave the process alone. The first exchange puts a foothold
    into it, and the end of the block takes that out. It is an ordinary outcome that
    the process ends meanwhile: then everything raises `ProcessLookupError`.

    Everything happens in one thread of ours, since the kernel binds tracing to it.

    Args:
        pid: the process.
        known_filters: see `Filters`.
        tails: see `AddressSpace`.

    Raises:
        OSError: EACCES or EPERM without leave to trace it (ptrace(2)); ESRCH or
            ENOENT if there is no such process.
    """

    pinned = False

    def __init__(
        self, pid: int, known_filters: int = 0, *, tails: bool = False
    ) -> None:
        self.pid, self.tails, self.never_drops = pid, tails, not tails
        self.keeps = frozenset({"dc"})
        self._allowance = Allowance(pid)
        self._files = ProcFiles(pid)
        self._threads = Threads(pid, known_filters)
        self._foothold: Foothold | None = None
        # A descriptor of ours, that in the process, and our view of it. What is mapped
        # by one grant must not be taken for another's, though their file is the same.
        self._pools: list[tuple[int, int, Comparison]] = []
        self._raised: Barrier | None = None
        self._protected = False
        self._watched: list[Span] = []  # by ourselves, ascending
        self._rows: npt.NDArray[np.uint8] | None = None

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._foothold:
            with contextlib.suppress(OSError):  # it ended, or cannot be stopped now
                self._foothold.leave()
        if self._raised:
            self._raised.leave_standing()  # of which nothing stands but for a list
            self._raised = None
        for ours, _lent, view in self._pools:
            view.close()
            os.close(ours)
        self._pools.clear()
        self._threads.close()
        self._files.close()

    def objection(self) -> str | None:
        """Say why nothing of this process may be merged."""
        return guards.objection(self.pid)

    def mappings(self, span: Span = EVERYTHING) -> list[maps.Mapping]:
        """List the mappings that meet `span`, ascending, with flags.

        Its text costs the kernel a walk of the page tables, 28 ms a GiB: for a part
        of much memory, flags are found by trying. What we have put there ourselves is
        left out.
        """
        found = self._tried(span) or maps.mappings(self.pid, span)
        ours = self._foothold.workspace if self._foothold else Span(0, 0)
        return [
            dataclasses.replace(mapping, flags=mapping.flags - {"uw"})
            if self._watches(mapping.span)
            else mapping
            for mapping in found
            if mapping.span.stop <= ours.start or mapping.span.start >= ours.stop
        ]

    def _tried(self, span: Span) -> list[maps.Mapping] | None:
        """List mappings as `mappings`; None where smaps is to be preferred."""
        if span == EVERYTHING or status.resident_pages(self.pid) < _MANY_PAGES:
            return None
        found = flags.query(self._files["maps"], span)
        if not found or len(found) > _MOST_TRIALS:
            return None
        if flags.too_small(found) or flags.have_shadow_stacks(self.pid):
            return None
        with contextlib.suppress(OSError):  # who has to know of it asks again
            return flags.with_flags(found, span, There(self._established()))
        return None

    def _watches(self, span: Span) -> bool:
        """Say whether we watch part of `span` ourselves."""
        behind = bisect.bisect_left(self._watched, Span(span.stop, span.stop))
        return behind > 0 and self._watched[behind - 1].stop > span.start

    def count_mappings(self, span: Span = EVERYTHING) -> int:
        """Count the mappings that meet `span`."""
        if span == EVERYTHING:
            return maps.count(self.pid)
        return maps.count_within(self._files["maps"], span)

    def may_add_mappings(self, wanted: int) -> int:
        """Grant up to `wanted` more mappings, to a quarter of the limit."""
        return self._allowance.grant(wanted)

    def pagemap(self) -> int:
        """Give an open /proc/PID/pagemap."""
        return self._files["pagemap"]

    def read(self, spans: Iterable[Span]) -> npt.NDArray[np.uint8]:
        """Copy whole pages out, one row a page; valid until the next time."""
        pieces = list(spans)
        pages = sum(piece.pages for piece in pieces)
        if self._rows is None or pages > len(self._rows):
            self._rows = np.empty((pages, PAGE_SIZE), np.uint8)
        return read_unpinned(self._files["mem"], pieces, self._rows)

    def kernel_pages(self) -> frozenset[int]:
        """Number the pages that the kernel itself writes to at any time."""
        return self._established().kernel_pages

    def require_harmless(self) -> None:
        """Hold one thread for a moment, to see what its seccomp filters would say.

        Raises:
            OSError: EOPNOTSUPP if a merge may not make its system calls; EBUSY if no
                thread stops.
        """
        self._threads.hold_one(self._threads.filters.require_harmless)

    @property
    def stops(self) -> list[float]:
        """How long all threads were held, in seconds, each time."""
        return self._threads.stops

    @contextlib.contextmanager
    def watched(self, spans: Iterable[Span]) -> Iterator[Callable[[], list[Span]]]:
        """Note in the block which pages are written to; gives what lists them.

        Memory that cannot be watched is passed over, and counts as not written to.
        """
        watch = self.watch()
        try:
            self._watched = [span for span in spans if watch.add(span)]
            for span in self._watched:
                watch.renew(span)
            yield functools.partial(watch.written, self._watched)
        finally:
            watch.end()
            self._watched = []

    def watch(self) -> WriteWatch:
        """Make a watch that outlives this. Who asked for it ends it.

        Raises:
            OSError: EOPNOTSUPP, EINVAL where there is none to be had.
        """
        return WriteWatch(self._established(), self.pagemap())

    @contextlib.contextmanager
    def protected(self, span: Span) -> Iterator[None]:
        """Make `exchange` able to hold off writers to `span`.

        Raises:
            BlockingIOError: a thread of it is at work for us yet.
            OSError: EBUSY if another userfaultfd watches the memory; EOPNOTSUPP
                for memory that can be written to, and not be protected.
        """
        barrier = self._barrier()
        if barrier.fd < 0:
            raise BlockingIOError(errno.EBUSY, BUSY)
        try:
            userfaultfd.register(barrier.fd, span)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                self._now(span)  # raises if that is because the program is gone
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
            barrier.end_at(span)

    def exchange(self, pool: int, exchanges: Sequence[Exchange]) -> list[int]:
        """Compare and replace; see `AddressSpace.exchange`.

        Writers wait from before the comparison until after the exchange, but its
        threads are held for the exchange only. If system calls that write would fail
        instead of waiting, all are held for the comparison, too.
        """
        try:
            there, comparison = self._pool_there(pool)
        except BlockingIOError:
            return [errno.EBUSY] * len(exchanges)
        work = Exchanging(self._site(), there, comparison, self._unchanged)
        return work.run(exchanges)

    def advise(self, spans: Sequence[Span], advice: int) -> list[int]:
        """Give the kernel an advice; see `AddressSpace.advise`.

        A thread of the process works for us meanwhile, so there should not be too
        many pages.
        """
        verdicts: list[int] = []
        for first in range(0, len(spans), _MOST_ADVICES):
            some = spans[first : first + _MOST_ADVICES]
            script = calls.CallList(There(self._established()))
            for span in some:
                script.syscall("madvise", span.start, span.size, advice)
            try:
                verdicts += (-script.run().results).tolist()
            except BlockingIOError:
                verdicts += [errno.EBUSY] * len(some)
        return verdicts

    def privatise(self, span: Span, prot: int, *, not_forked: bool = False) -> None:
        """Give `span` anonymous pages of its own that hold the same bytes.

        Raises:
            OSError: ENOMEM, EBUSY, and so on, with everything as it was.
        """
        left_over: list[Span] = []
        with self.protected(span):
            site = self._site()

            def attempt(held: list[int]) -> list[int]:
                script = site.script(held)
                script.copy(span, site.spare(span), prot, not_forked=not_forked)
                with site.kept([span]):
                    verdicts = script.run()
                left_over.extend(script.left_over)
                return verdicts

            (verdict,) = site.persist(attempt, 1)
        site.tidy(left_over)
        if verdict != DONE:
            raise OSError(verdict, f"un-merging {span}: {os.strerror(verdict)}")

    def _site(self) -> Site:
        barrier = self._barrier() if self._protected else None
        return Site(self._established(), barrier)

    def _unchanged(self, items: Sequence[Exchange]) -> Iterator[bool]:
        """See whether the mappings are what they were when it was planned.

        While all threads are held: what lies in the mapping that was met last needs
        no other look.
        """
        last: maps.Mapping | None = None
        for item in items:
            if last and last.span.start <= item.span.start < item.span.stop <= (
                last.span.stop
            ):
                yield _fits(last, item)
                continue
            found = self._now(item.span)
            last = found[0] if len(found) == 1 else None
            covered = sum((m.span & item.span).pages for m in found)
            yield covered == item.span.pages and all(_fits(m, item) for m in found)

    def _now(self, span: Span) -> list[maps.Mapping]:
        return maps.meeting(self._files["maps"], span)

    # -- what has to be there

    def _established(self) -> Foothold:
        if self._foothold is None:
            foothold = Foothold(self._threads)
            foothold.establish()
            self._foothold = foothold
        return self._foothold

    def _pool_there(self, pool: int) -> tuple[int, Comparison]:
        """Give the descriptor of a pool in the process, and our view of it."""
        for ours, lent, view in self._pools:
            if ptrace.same_description(ours, pool):
                return lent, view
        lent = self._established().lend(pool)
        ours = os.dup(pool)
        view = Comparison(self._files["mem"], ours)
        self._pools.append((ours, lent, view))
        return lent, view

    def _barrier(self) -> Barrier:
        if self._raised is None:
            self._raised = Barrier(self._established())
        return self._raised


def _fits(mapping: maps.Mapping, item: Exchange) -> bool:
    return (
        mapping.prot == item.prot
        and not mapping.shared
        and mapping.anonymous == item.anonymous
    )
