"""Sharing in user space: equal pages become private mappings of one pool page.

A private mapping of the pool's file (`MAP_PRIVATE`, the range's own protection)
shows the pool's page until it is written; the kernel then copies, which is all
the un-merging there is. Needs no privilege for memory of one's own.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from sksm.engines import plan
from sksm.fingerprints import fingerprint, of_zeros
from sksm.linux.maps import Mapping
from sksm.pages import PageBatch
from sksm.process import CHANGED, DONE, AddressSpace, Exchange, pages_of
from sksm.report import MergeReport
from sksm.spans import PAGE_SIZE, Span
from sksm.store import UNSEEN, ZERO, Store

TOO_MANY_MAPPINGS = "a quarter of vm.max_map_count is used up"


class PoolEngine:
    """Shares pages by way of a store's pool. Made anew for each merge."""

    name = "pool"

    def __init__(self, store: Store) -> None:
        self._store = store
        self._next: tuple[int, int] | None = None  # page number, and its likely slot

    @property
    def pool(self) -> os.stat_result:
        """`fstat` of the pool's file."""
        return os.fstat(self._store.pool)

    def share(self, space: AddressSpace, batch: PageBatch) -> MergeReport:
        """Merge each page of `batch` with its twin, if they are equal bytes."""
        return self._continue(space, batch) or self._examine(space, batch)

    def _continue(self, space: AddressSpace, batch: PageBatch) -> MergeReport | None:
        """Take the batch for a continuation of the last run, unseen and unhashed.

        Equal data comes in long runs, and the pool keeps pages in the order in
        which they were first met, so this mostly holds; if not, it costs little:
        the comparison stops at the first byte that differs.
        """
        span = batch.spans[0]
        if self._next is None or len(batch.spans) > 1:
            return None
        number, slot = self._next
        if number != span.start // PAGE_SIZE:
            return None
        if slot + span.pages > self._store.written:
            return None
        guess = Exchange(span, batch.mapping.prot, slot)
        if space.exchange(self._store.pool, [guess]) != [DONE]:
            self._next = None
            return None
        self._next = (number + span.pages, slot + span.pages)
        report = MergeReport()
        report.add(merged=span.pages)
        return report

    def _examine(self, space: AddressSpace, batch: PageBatch) -> MergeReport:
        """Fingerprint every page, have the store take the unknown ones, exchange."""
        rows = space.read(batch.spans)
        numbers = pages_of(batch.spans)
        prints = fingerprint(rows, self._store.seed)
        slots = self._store.lookup(prints)
        slots[prints == of_zeros(self._store.seed)] = ZERO
        own = plan.own_gaps(numbers, slots)
        fresh = np.zeros(len(slots), bool)
        offered = np.flatnonzero((slots == UNSEEN) & ~own)
        refusal = ""
        if len(offered):
            spans = _spans(numbers[offered])
            slots[offered], fresh[offered], refusal = self._store.offer(
                space.pid, spans
            )
        report = MergeReport()
        left = (slots == UNSEEN) & ~own
        if refusal:
            report.refuse(refusal, int(left.sum()))
        else:
            report.add(changed=int(left.sum()))  # gone, or all zeros, by now
        runs = self._affordable(
            space, batch.mapping, plan.runs(numbers, slots, own), report
        )
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
        report = MergeReport()
        verdicts = self._try(space, batch, numbers, runs)
        changed = [
            run
            for run, verdict in zip(runs, verdicts, strict=True)
            if verdict == CHANGED and run.slot is not None
        ]
        if changed:  # written to since, or a collision: leave those pages, try again
            second = [
                part for run in changed for part in self._unequal(space, numbers, run)
            ]
            left = sum(r.stop - r.first for r in changed) - sum(
                r.stop - r.first for r in second
            )
            report.add(changed=left)
            kept = [r for r in zip(runs, verdicts, strict=True) if r[0] not in changed]
            again = self._try(space, batch, numbers, second)
            pairs = [*kept, *zip(second, again, strict=True)]
        else:
            pairs = list(zip(runs, verdicts, strict=True))
        for run, verdict in pairs:
            self._count(report, run, verdict, fresh)
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
        verdicts = space.exchange(self._store.pool, exchanges) if exchanges else []
        self._next = None
        if runs and verdicts[-1] == DONE and runs[-1].slot is not None:
            pages = runs[-1].stop - runs[-1].first
            self._next = (int(numbers[runs[-1].stop - 1]) + 1, runs[-1].slot + pages)
        return verdicts

    def _unequal(
        self, space: AddressSpace, numbers: npt.NDArray[np.int64], run: plan.Run
    ) -> list[plan.Run]:
        """Look which pages of a run differ from the pool, and cut it there."""
        assert run.slot is not None
        span = _spans(numbers[run.first : run.stop])[0]
        here = space.read([span])
        there = np.empty_like(here)
        os.preadv(self._store.pool, [there.data.cast("B")], run.slot * PAGE_SIZE)
        slots = run.slot + np.arange(run.stop - run.first)
        slots[(here != there).any(axis=1)] = UNSEEN
        for first, stop in run.own:
            slots[first - run.first : stop - run.first] = UNSEEN
        mine = numbers[run.first : run.stop]
        own = plan.own_gaps(mine, slots)
        return [
            plan.Run(
                part.first + run.first,
                part.stop + run.first,
                part.slot,
                tuple((a + run.first, b + run.first) for a, b in part.own),
            )
            for part in plan.runs(mine, slots, own)
        ]

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
                report.refuse(TOO_MANY_MAPPINGS, run.stop - run.first)
        return sorted(kept, key=lambda run: run.first)

    @staticmethod
    def _count(
        report: MergeReport,
        run: plan.Run,
        verdict: int,
        fresh: npt.NDArray[np.bool_],
    ) -> None:
        pages = run.stop - run.first
        if verdict == CHANGED:
            report.add(changed=pages)
        elif verdict != DONE:
            report.refuse(f"the kernel refused it: {os.strerror(verdict)}", pages)
        elif run.slot is None:
            report.add(zero=pages)
        else:
            stored = int(fresh[run.first : run.stop].sum())
            report.add(
                stored=stored, merged=run.shared - stored, unique=pages - run.shared
            )


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
    )


def _spans(numbers: npt.NDArray[np.int64]) -> list[Span]:
    """Gather ascending page numbers into spans."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [
        Span(int(part[0]) * PAGE_SIZE, (int(part[-1]) + 1) * PAGE_SIZE)
        for part in np.split(numbers, breaks)
    ]
