"""One process that is watched: what is written to, and what stays as it is."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator

import numpy as np

from sksm import twins
from sksm.engines import Engine, frames, plan
from sksm.holding import Prints, entries_of, fingerprints_of, shared_frames
from sksm.linux import maps, pagemap
from sksm.linux.ksm import MARK
from sksm.linux.libc import MADV_MERGEABLE
from sksm.linux.pagemap import Category, copied
from sksm.outcomes import Outcome
from sksm.pages import is_pool
from sksm.pipeline import merge_all
from sksm.process import pages_of, spans_of, status
from sksm.process.other import EVERYTHING, OtherProcess
from sksm.process.watching import WriteWatch
from sksm.regranting import regrant
from sksm.report import MergeReport
from sksm.scanner.ages import Numbers, Pages
from sksm.scanner.layout import Bounds, Layout, guest_memory, joined
from sksm.scanner.rereading import Rereading
from sksm.scanner.trial import Trial
from sksm.spans import HUGE_SIZE, PAGE_SIZE, Span
from sksm.store import Store
from sksm.twins import Flags, pieces

_log = logging.getLogger(__name__)
FEW_PAGES = 64  # for which it is not worth to stop a process
_PATIENCE_SECONDS = 60.0
_TRIAL_SECONDS = 4.0
READ_PAGES = 4096  # at a time, before somebody looks at the budget again
_HUGE_PAGES = HUGE_SIZE // PAGE_SIZE
_WORTH_BREAKING = _HUGE_PAGES * 3 // 4  # of a huge page's pages that have twins


class Watched:
    """A process under watch, until `close`.

    Args:
        pid: which.
        quiet_seconds: see `Pages`.
        guest_only: it emulates a machine, and only that one's memory counts.

    Raises:
        OSError: as `OtherProcess`.
    """

    def __init__(self, pid: int, quiet_seconds: float, *, guest_only: bool) -> None:
        self.pid = pid
        self.pages = Pages(quiet_seconds)
        self.outcome = Outcome(pid, status.name(pid))  # of all since the beginning
        self.unmerged = 0  # pages, since the beginning
        self._shared_at = -_PATIENCE_SECONDS
        self.twin_pages = 0  # that had an equal page elsewhere, when last compared
        self._bounds = np.empty((0, 2), np.int64)  # of all mappings
        self._trial = Trial(max(_TRIAL_SECONDS, 2 * quiet_seconds))
        self._marked: Numbers | None = None  # blocks of 2 MiB, for KSM; None: not seen
        with contextlib.ExitStack() as scope:
            with OtherProcess(pid) as space:
                guest = guest_memory(space) if guest_only else None
                self._layout = Layout(pid, guest)
                scope.callback(self._layout.close)
                self._watch = _watch(space)
                scope.callback(self._watch.end)
            self._scope = scope.pop_all()

    def close(self) -> None:
        """Watch no longer. What is merged stays merged."""
        self._scope.close()

    def look(self, seconds: float) -> int:
        """See what was written to since the last time; gives how many pages.

        Args:
            seconds: that passed since.

        Raises:
            ProcessLookupError: it has ended, or runs another program.
        """
        self._follow_layout()
        self.pages.grow_older(seconds)
        return self._note_written()

    def _note_written(self) -> int:
        written = self._written()
        self.unmerged += self.pages.write(written)
        return len(written)

    def _written(self) -> Numbers:
        """List pages that were written to since the last time, and are private."""
        runs = self._watch.take_written(self._everything())
        kinds = runs["categories"]
        shared = kinds == int(Category.PRESENT | Category.FILE)
        self.pages.merge(pagemap.numbers_of(runs[shared]))
        return pagemap.numbers_of(runs[kinds == int(Category.PRESENT)])

    def _everything(self) -> Span:
        return Span(int(self._bounds[0, 0]), int(self._bounds[-1, 1]))

    def _follow_layout(self) -> None:
        """Watch what has been mapped since, and forget what is mapped no more."""
        first = not len(self._bounds)
        new = self._layout.news()
        if new is None:
            return
        if first:
            self._find_merged()
        self._add(new)
        self._bounds = self._layout.all()
        self.pages.keep(self._bounds)

    def _add(self, bounds: Bounds) -> None:
        whole = [span for span in joined(bounds) if not self._watch.add(span)]
        if not whole:  # one call was enough for each stretch
            return
        for start, stop in bounds.tolist():
            self._watch.add(Span(start, stop))

    def _find_merged(self) -> None:
        """Note what was merged before we came, be it that nobody has read it since."""
        with OtherProcess(self.pid) as space:
            spans = [m.span for m in maps.every_mapping(self.pid) if is_pool(m)]
            if spans:
                numbers, private = pages_of(spans), copied(space.pagemap(), spans)
                self.pages.merge(numbers[~np.isin(numbers, private)])

    def read(self, seed: int) -> Iterator[Prints]:
        """Read the pages that are due, some at a time; gives their fingerprints."""
        due = self.pages.due()
        with OtherProcess(self.pid) as space:
            for first in range(0, len(due), READ_PAGES):
                some = self._private(space, due[first : first + READ_PAGES])
                found = [np.empty(0, np.uint64)]
                for spans, prints in fingerprints_of(space, spans_of(some), seed):
                    if prints is None:
                        self.pages.strike(pages_of(spans))
                    else:
                        self.pages.name(pages_of(spans), prints)
                        found.append(prints)
                yield np.concatenate(found)

    def _private(self, space: OtherProcess, numbers: Numbers) -> Numbers:
        """Leave out pages that are gone, or merged: a look at them may bring them."""
        entries = entries_of(space.pagemap(), numbers)
        there = entries & np.uint64(pagemap.ENTRY_PRESENT) != 0
        self.pages.forget(numbers[~there])
        shared = there & (entries & np.uint64(pagemap.ENTRY_FILE) != 0)
        self.pages.merge(numbers[shared])
        private: Numbers = numbers[there & ~shared]
        return private

    def present(self, numbers: Numbers) -> tuple[Flags, Prints]:
        """Say which pages, ascending, are still there; forget the others.

        Returns:
            That, and the frames of those that are, as `shared_frames` names them.
        """
        with OtherProcess(self.pid) as space:
            entries = entries_of(space.pagemap(), numbers)
        there: Flags = entries & np.uint64(pagemap.ENTRY_PRESENT) != 0
        self.pages.forget(numbers[~there])
        return there, shared_frames(entries[there], numbers[there])

    def unbroken(self, numbers: Numbers) -> Flags:
        """Say which pages, ascending, are part of huge pages not worth breaking."""
        if not len(numbers):
            return np.empty(0, bool)
        blocks, counts = np.unique(numbers // _HUGE_PAGES, return_counts=True)
        few = np.isin(numbers // _HUGE_PAGES, blocks[counts < _WORTH_BREAKING])
        around = Span(int(blocks[0]) * HUGE_SIZE, (int(blocks[-1]) + 1) * HUGE_SIZE)
        with OtherProcess(self.pid) as space:
            huge = pagemap.having(space.pagemap(), around, Category.HUGE)
        return few & np.isin(numbers, pagemap.numbers_of(huge), assume_unique=True)

    def room(self, now: float) -> int:
        """Say how many pages may be merged now: few, until they have proved to last."""
        return self._trial.room(self.pages.seen(), self.unmerged, now)

    def enough(self, now: float) -> int:
        """Say for how many pages it is worth to stop the process now.

        What it costs to begin grows with the number of its mappings. So the more it
        has, the more pages have to come together; but none waits for ever.
        """
        patience = 1.0 - (now - self._shared_at) / _PATIENCE_SECONDS
        return max(FEW_PAGES, int(len(self._bounds) / 4 * patience))

    def share(self, wanted: Numbers, engine: Engine, now: float) -> MergeReport:
        """Merge pages that have twins, ascending, at least one, into a pool.

        What does not come to be merged is left alone for a while.
        """
        self._shared_at = now
        spans = self._pieces(wanted)
        with OtherProcess(self.pid) as space:
            with self._unwatched(spans):
                report = merge_all(space, spans, engine=engine)
            self.outcome.stops += space.stops
            merged = self._in_pool(space.pagemap(), wanted)
        self.pages.merge(wanted[merged])
        self.pages.strike(wanted[~merged])
        self._trial.merged(int(merged.sum()), now)
        self.outcome.report += report
        return report

    def regrant(self, store: Store) -> None:
        """Keep no more of a pool than the process still shows, if that is worth it."""
        pool = [m.span for m in maps.every_mapping(self.pid) if is_pool(m)]
        if not pool:
            return
        with OtherProcess(self.pid) as space, self._unwatched(pool):
            regrant(space, store)
            self.outcome.stops += space.stops

    def offer(self, wanted: Numbers, engine: Engine, now: float) -> None:
        """Offer pages, ascending, at least one, to an engine that merges in place.

        `settle` sees what came of it.
        """
        self._shared_at = now
        spans = self._pieces(wanted)
        with OtherProcess(self.pid) as space, self._unwatched(spans):
            self.outcome.report += merge_all(space, spans, engine=engine)
            self.outcome.stops += space.stops

    def mark(self, numbers: Numbers) -> None:
        """Mark for KSM what is around pages, by blocks of 2 MiB, unless it is."""
        blocks = np.unique(numbers // _HUGE_PAGES)
        with OtherProcess(self.pid) as space:
            if self._marked is None:
                found = [m.span for m in space.mappings(EVERYTHING) if MARK in m.flags]
                self._marked = np.unique(pages_of(found) // _HUGE_PAGES)
            new = blocks[~np.isin(blocks, self._marked)]
            if not len(new):
                return
            spans = []
            for run in spans_of(new):
                block = Span(run.start * _HUGE_PAGES, run.stop * _HUGE_PAGES)
                bounds = self._layout.fitting(block).tolist()
                spans += [Span(start, stop) & block for start, stop in bounds]
            space.advise(spans, MADV_MERGEABLE)
            self.outcome.stops += space.stops
        self._marked = np.union1d(self._marked, new)

    def settle(self, wanted: Numbers, *, done: bool) -> None:
        """See which pages were merged in place, of those that were worth it, ascending.

        Args:
            wanted: those.
            done: KSM has looked at all of them. What it did not merge then is left
                alone for a while.
        """
        # A page that was replaced looks written to, too. It is one of these first, or
        # what is written to from now on would pass for merged.
        written = self._written()
        looked = np.union1d(written, wanted)
        with OtherProcess(self.pid) as space:
            private = looked[~frames.shared_pages(space, looked).merged]
        self.unmerged += self.pages.write(np.intersect1d(written, private))
        self.pages.merge(np.setdiff1d(wanted, private))
        if done:
            self.pages.strike(np.setdiff1d(np.intersect1d(wanted, private), written))

    def _pieces(self, wanted: Numbers) -> list[Span]:
        """Cover pages with spans, across short gaps of other pages we have read."""
        known, _ = self.pages.named()
        bounds = pieces(
            np.isin(known, wanted, assume_unique=True),
            twins.stretches(known, np.empty(0, np.int64)),
            plan.SHORT_GAP,
        )
        return [
            Span(int(known[first]) * PAGE_SIZE, (int(known[last]) + 1) * PAGE_SIZE)
            for first, last in bounds - np.array([0, 1])
        ]

    @contextlib.contextmanager
    def _unwatched(self, spans: list[Span]) -> Iterator[None]:
        """Do without the watch in the block: merging needs a userfaultfd of its own.

        Whole mappings: part of one would be a mapping by itself, and its last page
        not merged. What is written to meanwhile goes unnoticed.
        """
        self._note_written()
        around = Span(spans[0].start, spans[-1].stop)
        for span in joined(self._layout.fitting(around)):
            self._watch.leave(span)
        try:
            yield
        finally:
            self._follow_layout()
            self._add(self._layout.fitting(around))
            self._watch.take_written(around)

    def _in_pool(self, table: int, wanted: Numbers) -> Flags:
        """Say which pages were merged, of those that had been there and private.

        What shows the pool is a file's page, or absent until somebody reads it; what
        holds zeros shows the kernel's page of them. A real swap entry is neither.
        """
        around = Span(int(wanted[0]) * PAGE_SIZE, (int(wanted[-1]) + 1) * PAGE_SIZE)
        zeros = pagemap.numbers_of(pagemap.having(table, around, Category.PFNZERO))
        entries = entries_of(table, wanted)
        absent = entries & _SOMEWHERE == 0
        absent |= entries & _MARKER == _MARKER
        merged: Flags = absent | (entries & np.uint64(pagemap.ENTRY_FILE) != 0)
        return merged | np.isin(wanted, zeros, assume_unique=True)


# What userfaultfd leaves in an absent entry looks like a swap entry.
_SOMEWHERE = np.uint64(pagemap.ENTRY_PRESENT | pagemap.ENTRY_SWAPPED)
_MARKER = np.uint64(pagemap.ENTRY_SWAPPED | pagemap.ENTRY_UFFD_WP)


def _watch(space: OtherProcess) -> WriteWatch | Rereading:
    """Have the kernel note what is written to; read it all, where it does not."""
    try:
        return space.watch()
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        _log.warning(
            "process %d: every page is read at every look, as the kernel cannot note "
            "what is written to (%s; Linux 6.7, userfaultfd)",
            *(space.pid, error.strerror),
        )
        return Rereading(space.pid)
