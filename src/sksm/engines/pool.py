"""Sharing in user space: equal pages become private mappings of one pool page.

A private mapping of the pool's file (`MAP_PRIVATE`, the range's own protection)
shows the pool's page until it is written; the kernel then copies, which is all
the un-merging there is. Needs no privilege for memory of one's own.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sksm.engines import plan
from sksm.fingerprints import fingerprint, of_zeros
from sksm.linux.maps import Mapping
from sksm.pages import LAST_PAGE, PageBatch, is_pool
from sksm.process import (
    BUSY,
    CHANGED,
    DONE,
    AddressSpace,
    Exchange,
    pages_of,
)
from sksm.report import MergeReport
from sksm.spans import PAGE_SIZE, Span, groups
from sksm.store import UNSEEN, ZERO, Offered, Store

_OFFER_PAGES = 512  # of new data at a time: the store works on while we exchange
# Gives the fingerprints of pages by number, as far back as they were taken; None if
# it does not have all of them.
Names = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.uint64] | None]
TOO_MANY_MAPPINGS = "a quarter of vm.max_map_count is used up"
NOT_AS_CODE = (
    "the pool may not be mapped like that: a security module may forbid executable "
    "memory (SELinux: execmem)"
)
_REFUSED = {errno.EBUSY: BUSY, errno.EACCES: NOT_AS_CODE, errno.EPERM: NOT_AS_CODE}


class PoolEngine:
    """Shares pages by way of a store's pool. Made anew for each merge.

    Args:
        store: has the pool.
        names: fingerprints that somebody took before, to spare reading the pages
            for them. Old ones cost merges (never bytes: those are compared).
    """

    name = "pool"
    in_place = False

    def __init__(self, store: Store, names: Names = lambda _: None) -> None:
        self._store, self._names = store, names
        self._next: tuple[int, int] | None = None  # page number, and its likely slot
        self._all_new = False  # nobody knew a page of the last batch

    @property
    def pool(self) -> str:
        """The name of the pool's file."""
        return self._store.name

    def share(self, space: AddressSpace, batch: PageBatch) -> MergeReport:
        """Merge each page of `batch` with its twin, if they are equal bytes."""
        if batch.last:
            self._next, self._all_new = None, False
            return self._examine(space, batch)
        report = MergeReport()
        rest = self._continue(space, batch, report)
        if rest and self._all_new:
            rest = self._take(space, PageBatch(batch.mapping, rest), report)
        if rest:
            report += self._examine(space, PageBatch(batch.mapping, rest))
        return report

    def finish(self) -> dict[int, MergeReport]:
        """Nothing is ever put off."""
        return {}

    def _continue(
        self, space: AddressSpace, batch: PageBatch, report: MergeReport
    ) -> tuple[Span, ...]:
        """Take the batch for a continuation of the last run, unseen and unhashed.

        Equal data comes in long runs, and the pool keeps pages in the order in
        which they were first met, so this mostly holds; if not, it costs little:
        the comparison stops at the first byte that differs.

        Returns:
            The parts of the batch for which it did not hold.
        """
        span = batch.spans[0]
        if self._next is None or len(batch.spans) > 1:
            return batch.spans
        number, slot = self._next
        self._next = None
        if number != span.start // PAGE_SIZE:
            return batch.spans
        if not self._store.claim(slot, span.pages):
            return batch.spans
        numbers = pages_of([span])
        runs = plan.straight(number, slot, span.pages)
        verdicts = self._try(space, batch, numbers, runs)
        for run, verdict in zip(runs, verdicts, strict=True):
            report.add(merged=run.shared if verdict == DONE else 0)
        left = [
            numbers[run.first : run.stop]
            for run, verdict in zip(runs, verdicts, strict=True)
            if verdict != DONE
        ]
        return tuple(_spans(np.concatenate(left))) if left else ()

    def _take(
        self, space: AddressSpace, batch: PageBatch, report: MergeReport
    ) -> tuple[Span, ...]:
        """Offer a batch unhashed, since nobody knew the one before it either.

        The store fingerprints what it takes, so we need not; and it takes the
        next part while we exchange the last.

        Returns:
            The parts of the batch that were not taken: zeros, for example.
        """
        parts = list(groups(batch.spans, _OFFER_PAGES))
        left = []
        with contextlib.closing(self._store.offers(space.pid, parts)) as answers:
            for part, (slots, fresh, _) in zip(parts, answers, strict=True):
                numbers = pages_of(part)
                left.append(numbers[slots == UNSEEN])
                self._all_new &= bool(fresh.all())
                runs = plan.runs(numbers, slots, np.zeros(len(slots), bool))
                runs = self._affordable(space, batch.mapping, runs, report)
                report += self._exchange(space, batch, numbers, runs, fresh)
        return tuple(_spans(np.concatenate(left)))

    def _examine(self, space: AddressSpace, batch: PageBatch) -> MergeReport:
        """Fingerprint every page, have the store take the unknown ones, exchange."""
        report = MergeReport()
        numbers = pages_of(batch.spans)
        prints = self._names(numbers)
        if prints is None:
            prints = fingerprint(space.read(batch.spans), self._store.seed)
        slots = self._store.lookup(prints)
        slots[prints == of_zeros(self._store.seed)] = ZERO
        if batch.lone and not (batch.mapping.anonymous or is_pool(batch.mapping)):
            report.refuse(LAST_PAGE, 1)  # grown, it would show more of the file
            return report
        if batch.lone and slots[0] != ZERO:
            slots[0] = UNSEEN  # grown, it would show what lies behind other slots
        self._all_new = bool((slots == UNSEEN).all())
        if space.never_drops:
            own = plan.own_gaps(numbers, slots)
        else:  # a page of its own that is dropped would show what the pool has there
            own = np.zeros(len(slots), bool)
        report.add(unique=own.sum())
        spans = _spans(numbers[(slots == UNSEEN) & ~own])
        fresh = np.zeros(len(slots), bool)
        if spans:
            offered = self._store.offer(space.pid, spans, alone=batch.lone)
            fresh = _fill_in(slots, own, offered, report)
        runs = plan.runs(numbers, slots, own)
        runs = self._affordable(space, batch.mapping, runs, report)
        report += self._exchange(space, batch, numbers, runs, fresh)
        return report

    def _exchange(
        self,
        space: AddressSpace,
        batch: PageBatch,
        numbers: npt.NDArray[np.int64],
        runs: list[plan.Run],
        fresh: npt.NDArray[np.bool_],
    ) -> MergeReport:
        """Exchange runs; where bytes differ, once more without the pages that do."""
        report = MergeReport()
        runs = [part for run in runs for part in self._grantable(run)]
        verdicts = self._try(space, batch, numbers, runs)
        again: list[plan.Run] = []
        for run, verdict in zip(runs, verdicts, strict=True):
            if verdict == CHANGED and run.slot is not None:
                equal = self._equal(space, numbers, run, run.slot)
                again += equal
                report.add(changed=run.shared - sum(part.shared for part in equal))
            else:
                _count(report, run, verdict, fresh)
        if again:  # written to since, or a collision of fingerprints
            verdicts = self._try(space, batch, numbers, again)
            for run, verdict in zip(again, verdicts, strict=True):
                _count(report, run, verdict, fresh)
        return report

    def _try(
        self,
        space: AddressSpace,
        batch: PageBatch,
        numbers: npt.NDArray[np.int64],
        runs: list[plan.Run],
    ) -> list[int]:
        """Exchange each run; remember where the last one would go on."""
        exchanges = [_exchange_of(run, numbers, batch) for run in runs]
        try:
            verdicts = space.exchange(self._store.pool, exchanges) if exchanges else []
        except BaseException:
            self._store.in_doubt()
            raise
        self._next = None
        self._note(runs, verdicts)
        if runs and verdicts[-1] == DONE and runs[-1].slot is not None:
            pages = runs[-1].stop - runs[-1].first
            self._next = (int(numbers[runs[-1].stop - 1]) + 1, runs[-1].slot + pages)
        return verdicts

    def _grantable(self, run: plan.Run) -> list[plan.Run]:
        """Cut a run at its own pages, unless all slots that it covers can be ours.

        A slot behind a page of its own shows when that page is dropped.
        """
        if not run.own or run.slot is None:
            return [run]
        if self._store.claim(run.slot, run.stop - run.first):
            return [run]
        return run.without_own()

    def _note(self, runs: list[plan.Run], verdicts: list[int]) -> None:
        """Tell the store what has been mapped, and may be mapped yet."""
        for run, verdict in zip(runs, verdicts, strict=True):
            if run.slot is None:
                continue
            if verdict == DONE:
                self._store.mapped(run.slot, run.stop - run.first)
            elif verdict != CHANGED:  # half done; or a thread given up may do it yet
                self._store.in_doubt()

    def _equal(
        self,
        space: AddressSpace,
        numbers: npt.NDArray[np.int64],
        run: plan.Run,
        slot: int,
    ) -> list[plan.Run]:
        """Look which pages of a run equal the pool's, and cut it down to those."""
        mine = numbers[run.first : run.stop]
        here = space.read(_spans(mine))
        there = np.empty_like(here)
        os.preadv(self._store.pool, [there.data.cast("B")], slot * PAGE_SIZE)
        slots = slot + np.arange(len(mine))
        slots[(here != there).any(axis=1)] = UNSEEN
        for first, stop in run.own:
            slots[first - run.first : stop - run.first] = UNSEEN
        found = plan.runs(mine, slots, plan.own_gaps(mine, slots))
        return [part.shifted(run.first) for part in found]

    @staticmethod
    def _affordable(
        space: AddressSpace,
        mapping: Mapping,
        runs: list[plan.Run],
        report: MergeReport,
    ) -> list[plan.Run]:
        """Keep the longest runs if all of them would be too many mappings."""
        costs = [0 if run.slot is None and mapping.anonymous else 2 for run in runs]
        granted = space.may_add_mappings(sum(costs))
        if granted == sum(costs):
            return runs
        kept = []
        for run, cost in sorted(
            zip(runs, costs, strict=True), key=lambda pair: pair[0].first - pair[0].stop
        ):
            if cost <= granted:
                granted -= cost
                kept.append(run)
            else:
                report.refuse(TOO_MANY_MAPPINGS, run.shared)
        return sorted(kept, key=lambda run: run.first)


def _fill_in(
    slots: npt.NDArray[np.int64],
    own: npt.NDArray[np.bool_],
    offered: Offered,
    report: MergeReport,
) -> npt.NDArray[np.bool_]:
    """Fill in the slots of pages that were offered.

    Returns:
        Which pages are new to the store, shape (n,).
    """
    fresh = np.zeros(len(slots), bool)
    unseen = np.flatnonzero((slots == UNSEEN) & ~own)
    slots[unseen], fresh[unseen], refusal = offered
    left = int((slots[unseen] == UNSEEN).sum())
    if refusal:
        report.refuse(refusal, left)
    else:
        report.add(changed=left)  # gone, or all zeros, by now
    return fresh


def _count(
    report: MergeReport, run: plan.Run, verdict: int, fresh: npt.NDArray[np.bool_]
) -> None:
    """Count the pages of a run, but not its own ones, by what became of it."""
    if verdict == CHANGED:
        report.add(changed=run.shared)
    elif verdict != DONE:
        unforeseen = f"the kernel refused it: {os.strerror(verdict)}"
        report.refuse(_REFUSED.get(verdict, unforeseen), run.shared)
    elif run.slot is None:
        report.add(zero=run.shared)
    else:
        stored = int(np.count_nonzero(fresh[run.first : run.stop]))
        for first, stop in run.own:
            stored -= int(np.count_nonzero(fresh[first:stop]))
        report.add(stored=stored, merged=run.shared - stored)


def _exchange_of(
    run: plan.Run, numbers: npt.NDArray[np.int64], batch: PageBatch
) -> Exchange:
    start = int(numbers[run.first]) * PAGE_SIZE
    return Exchange(
        Span(start, start + (run.stop - run.first) * PAGE_SIZE),
        batch.mapping.prot,
        run.slot,
        tuple((first - run.first, stop - run.first) for first, stop in run.own),
        anonymous=batch.mapping.anonymous,
        not_forked="dc" in batch.mapping.flags,
        apart=batch.last and not batch.lone,
    )


def _spans(numbers: npt.NDArray[np.int64]) -> list[Span]:
    """Gather ascending page numbers into spans."""
    if not len(numbers):
        return []
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [
        Span(int(part[0]) * PAGE_SIZE, (int(part[-1]) + 1) * PAGE_SIZE)
        for part in np.split(numbers, breaks)
    ]
