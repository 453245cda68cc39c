"""The order of work when pages of another process are exchanged.

Writers are held off, pages compared, all threads held, pages exchanged, threads let
go, writers let in. While threads are held for some pages, the next are compared.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from sksm.linux import calls
from sksm.process import BUSY, CHANGED, EXCHANGE_PAGES, Exchange
from sksm.process.comparing import Comparison
from sksm.process.foothold import Foothold
from sksm.process.script import RemoteScript, built_aside
from sksm.process.there import There
from sksm.process.watching import Barrier
from sksm.spans import PAGE_SIZE, Span

_MOST_AT_ONCE = 32  # exchanges in one stop
# How long a thread may take to stop while the barrier is up. One that meets it in a
# system call never does: asked to stop, it tries again and again (handle_userfault).
_BARRIER_SECONDS = 0.001
_PAUSES = (0.001, 0.01, 0.1)  # seconds before stopping it again, if it would not

Attempt = Callable[[list[int]], list[int]]  # threads held -> verdicts


class Site:
    """Memory of a process in which pages are exchanged.

    Args:
        foothold: in that process.
        barrier: what holds writers off; None if nobody can write.
    """

    def __init__(self, foothold: Foothold, barrier: Barrier | None) -> None:
        self._foothold, self._barrier = foothold, barrier

    def script(self, held: list[int], pool: int = -1) -> RemoteScript:
        """Begin a script for threads that are held."""
        keeping = self._barrier.fd if self._barrier else None
        return RemoteScript(There(self._foothold, held, keeping), pool)

    def spare(self, span: Span) -> int:
        """Give unused addresses at which to build what will replace `span`."""
        return self._foothold.spare(span.size, span.start)

    @property
    def astray(self) -> bool:
        """Whether a list was given up, and may be worked off yet."""
        return self._foothold.astray

    @property
    def shy(self) -> bool:
        """Whether writers must not meet the barrier: their calls would fail."""
        return self._barrier is not None and not self._barrier.whole

    @contextlib.contextmanager
    def kept(self, spans: Sequence[Span]) -> Iterator[None]:
        """Hold writers to `spans` off."""
        barrier = self._barrier
        if barrier is None:
            yield
            return
        raised: list[Span] = []
        try:
            for span in spans:
                raised.append(span)
                with contextlib.suppress(FileNotFoundError):  # unmapped meanwhile
                    barrier.raise_at(span)
            yield
        finally:
            if self._foothold.astray:
                barrier.leave_standing()
            for span in raised:
                barrier.lower_at(span)

    def touched_by_kernel(self, span: Span) -> bool:
        """Say whether the kernel itself writes to `span` at any time."""
        first, stop = span.start // PAGE_SIZE, span.stop // PAGE_SIZE
        return any(first <= page < stop for page in self._foothold.kernel_pages)

    def persist(self, attempt: Attempt, count: int) -> list[int]:
        """Hold all threads and make an attempt; several, if they would not stop.

        Returns:
            Its verdicts, or `count` times EBUSY.
        """
        for pause in _PAUSES:
            if verdicts := self.once(attempt):
                return verdicts
            time.sleep(pause)
        return [errno.EBUSY] * count

    def once(self, attempt: Attempt, patience_s: float | None = None) -> list[int]:
        """Hold all threads and make an attempt; gives [] if they would not stop."""
        with contextlib.suppress(BlockingIOError):
            return self._foothold.threads.hold_all(attempt, patience_s)
        return []

    def tidy(self, spans: Sequence[Span]) -> None:
        """Unmap what did not take the place of pages."""
        if spans:
            script = calls.CallList(There(self._foothold))
            for span in spans:
                script.syscall("munmap", span.start, span.size)
            script.run()


class Exchanging:
    """Exchanges pages with those of one pool.

    Args:
        site: where.
        pool: its descriptor in that process.
        comparison: of both.
        unchanged: says whether exchanges still fit the mappings.
    """

    def __init__(
        self,
        site: Site,
        pool: int,
        comparison: Comparison,
        unchanged: Callable[[Sequence[Exchange]], Iterable[bool]],
    ) -> None:
        self._site, self._pool = site, pool
        self._comparison, self._unchanged = comparison, unchanged
        self._left_over: list[Span] = []

    def run(self, exchanges: Sequence[Exchange]) -> list[int]:
        """Give the verdicts; see `AddressSpace.exchange`."""
        possible = [
            item for item in exchanges if not self._site.touched_by_kernel(item.span)
        ]
        work = self._shyly if self._site.shy else self._go
        done = dict(zip(possible, work(possible), strict=True))
        self._site.tidy(self._left_over)
        return [done.get(item, CHANGED) for item in exchanges]

    def _go(self, exchanges: Sequence[Exchange]) -> Iterator[int]:
        with contextlib.ExitStack() as scope:
            ahead: collections.deque[Callable[[], list[int]]] = collections.deque()
            for some in _slices(exchanges):
                try:
                    ahead.append(scope.enter_context(self._prepared(some)))
                except BlockingIOError:  # a list was given up, and with it the barrier
                    ahead.append(functools.partial(_busy, len(some)))
                if len(ahead) > 1:
                    yield from ahead.popleft()()
            while ahead:
                yield from ahead.popleft()()

    @contextlib.contextmanager
    def _prepared(self, some: list[Exchange]) -> Iterator[Callable[[], list[int]]]:
        """Hold writers off and begin to compare; gives what does the rest."""
        with contextlib.ExitStack() as kept:
            kept.enter_context(self._site.kept([item.span for item in some]))
            compared = self._comparison.begin(some)

            def conclude() -> list[int]:
                equal = compared()
                if not any(equal):
                    verdicts = [CHANGED] * len(some)
                else:
                    attempt = functools.partial(self._replace, some, equal)
                    verdicts = self._site.once(attempt, _BARRIER_SECONDS)
                kept.close()
                return verdicts or self._patiently(some)

            yield conclude

    def _patiently(self, some: list[Exchange]) -> list[int]:
        """Hold all threads first: one may have met the barrier in a system call.

        There it cannot be stopped.
        """
        attempt = functools.partial(self._compare_and_replace, some)
        return self._site.persist(attempt, len(some))

    def _shyly(self, exchanges: Sequence[Exchange]) -> Iterator[int]:
        """Compare while all threads are held."""
        for some in _slices(exchanges):
            attempt = functools.partial(self._compare_and_replace, some)
            yield from self._site.persist(attempt, len(some))

    def _compare_and_replace(self, some: list[Exchange], held: list[int]) -> list[int]:
        with self._site.kept([item.span for item in some]):
            return self._replace(some, self._comparison.begin(some)(), held)

    def _replace(
        self, some: list[Exchange], equal: list[bool], held: list[int]
    ) -> list[int]:
        if self._site.astray:
            # What it has mapped by now would pass for a change of the program's.
            raise BlockingIOError(errno.EBUSY, BUSY)
        same = list(itertools.compress(some, equal))
        chosen = list(itertools.compress(same, self._unchanged(same)))
        script = self._site.script(held, self._pool)
        for item in chosen:
            script.add(item, self._spare(item))
        done = dict(zip(chosen, script.run(), strict=True)) if chosen else {}
        self._left_over += script.left_over
        return [done.get(item, CHANGED) for item in some]

    def _spare(self, item: Exchange) -> int:
        return self._site.spare(item.span) if built_aside(item) else 0


def _busy(count: int) -> list[int]:
    return [errno.EBUSY] * count


def _slices(exchanges: Sequence[Exchange]) -> Iterator[list[Exchange]]:
    """Cut a list into what is done in one stop."""
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
