"""What an operator does to programs that know nothing of it: merge, and undo it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sksm.daemon import client, runtime
from sksm.engines import Engine, choice
from sksm.engines.kernel import KernelEngine
from sksm.engines.ksm import KsmEngine
from sksm.engines.pool import PoolEngine
from sksm.errors import ProcessGone, SksmError
from sksm.estimate import Estimate
from sksm.linux import ksm, libc
from sksm.outcomes import Outcome, failures_of
from sksm.pages import KEPT_IN_PLACE, why_not
from sksm.pipeline import merge_all
from sksm.process import (
    domain,
    pages_of,
    permission,
    spans_of,
    status,
    within,
)
from sksm.process.domain import Domain
from sksm.process.other import OtherProcess
from sksm.regranting import regrant
from sksm.report import Step
from sksm.spans import PAGE_SIZE, Span
from sksm.store import Store
from sksm.twins import Flags

WATCH_SECONDS = 5.0  # at most, unless told otherwise
_LOOK_SECONDS = 0.3  # from one look to the next which pages were written to
_FEW = 0.01  # of all pages: so few hot ones do not change what else is worth it
_STEADY = 0.005  # of all pages: if fewer are new, the rest will mostly stay unwritten
_MIB = 1 << 20
NO_GAIN = (
    "merging would free {:.1f} MiB, less than the {:.1f} MiB that sksmd takes: name "
    "more processes, or insist (--engine pool)"
)
HOT = "written to while it was watched"


_Written = Callable[[], list[Span]]  # lists what was written to so far


@dataclasses.dataclass(frozen=True, slots=True)
class Wishes:
    """How to merge."""

    watch_seconds: float = WATCH_SECONDS
    engine: str = choice.AUTO  # that somebody insists on; see `choice.choose`
    dry_run: bool = False


def merge(pids: Sequence[int], wishes: Wishes, step: Step) -> list[Outcome]:
    """Merge what processes hold twice, each with others of its domain."""
    outcomes = {pid: Outcome(pid, status.name(pid)) for pid in pids}
    crews: dict[tuple[Domain, str], list[Outcome]] = {}
    for pid, outcome in outcomes.items():
        with failures_of(outcome):
            permission.require_memory(pid)
            outcome.engine, outcome.refusal = choice.choose(pid, wishes.engine)
            if not outcome.refusal:
                crews.setdefault((domain.of(pid), outcome.engine), []).append(outcome)
    for (whose, engine), members in crews.items():
        if engine in choice.IN_PLACE:
            _Crew(None, members, wishes, step).merge()
        else:
            with client.opened(whose) as store:
                _Crew(store, members, wishes, step).merge()
    return list(outcomes.values())


class _Crew:
    """The processes of one domain, merged with each other by one engine.

    Args:
        store: for the pool engine.
    """

    def __init__(
        self, store: Store | None, outcomes: list[Outcome], wishes: Wishes, step: Step
    ) -> None:
        self._store, self._wishes, self._step = store, wishes, step
        self._outcomes = {outcome.pid: outcome for outcome in outcomes}
        self._scope = contextlib.ExitStack()
        self._spaces: dict[int, OtherProcess] = {}
        self._hot: dict[int, npt.NDArray[np.int64]] = {}  # numbers of pages

    def merge(self) -> None:
        with self._scope:
            for pid, outcome in self._outcomes.items():
                with failures_of(outcome):
                    self._spaces[pid] = self._scope.enter_context(OtherProcess(pid))
                    if not self._store:
                        self._spaces[pid].keeps |= KEPT_IN_PLACE
            estimate = self._choose()
            if not self._wishes.dry_run and not self._loses():
                self._share(estimate)
        for pid, space in self._spaces.items():
            self._outcomes[pid].stops = list(space.stops)

    def _loses(self) -> bool:
        """Leave all alone if merging them would take more than it frees."""
        if not self._store or self._wishes.engine != choice.AUTO:
            return False
        done = [self._outcomes[pid] for pid in self._spaces]
        worth = [outcome.worth for outcome in done if outcome.worth]
        freed = sum(one.duplicate_bytes + one.zero_bytes for one in worth)
        upkeep = self._store.upkeep_bytes()
        if freed >= upkeep:
            return False
        for outcome in done:
            outcome.refusal = NO_GAIN.format(freed / _MIB, upkeep / _MIB)
        return True

    def _choose(self) -> Estimate:
        """Find what is worth merging: pages with twins that stay unwritten."""
        estimate = _estimate(self._store)
        with contextlib.ExitStack() as scope:
            watches = self._watch(scope)
            started = time.monotonic()
            for pid, space in list(self._spaces.items()):
                with failures_of(self._outcomes[pid]):
                    tell = self._step(f"reading {pid}", status.private_pages(pid))
                    if not estimate.add(space, tell):
                        raise ProcessGone(f"process {pid} ended meanwhile")
            for pid in set(self._spaces) - set(estimate.holdings):
                del self._spaces[pid]
            hot = self._await_steady(estimate, watches, started)
        warm = sum(int(flags.sum()) for flags in hot.values())
        pages = sum(len(one.numbers) for one in estimate.holdings.values())
        cold = estimate.apart(hot) if warm > _FEW * pages else estimate
        self._hot = {
            pid: estimate.holdings[pid].numbers[flags] for pid, flags in hot.items()
        }
        for pid in estimate.holdings:
            outcome = self._outcomes[pid]
            outcome.worth = cold.worth(pid)
            if pid in hot:
                twin = estimate.compared[pid].twin & hot[pid]
                outcome.hot_bytes = int(twin.sum()) * PAGE_SIZE
        return cold

    def _watch(self, scope: contextlib.ExitStack) -> dict[int, _Written]:
        if not self._wishes.watch_seconds or self._wishes.dry_run:
            return {}
        watches = {}
        for pid, space in list(self._spaces.items()):
            with failures_of(self._outcomes[pid]):
                spans = [
                    mapping.span
                    for mapping in space.mappings()
                    if mapping.prot & libc.PROT_WRITE
                    and not why_not(mapping, space.keeps)
                ]
                watches[pid] = scope.enter_context(space.watched(spans))
            if self._outcomes[pid].failed:
                del self._spaces[pid]
        return watches

    def _await_steady(
        self, estimate: Estimate, watches: dict[int, _Written], started: float
    ) -> dict[int, Flags]:
        """Watch until hardly any page is written to for the first time."""
        if not watches:
            return {}
        stop = started + self._wishes.watch_seconds
        time.sleep(max(0.0, min(started + _LOOK_SECONDS, stop) - time.monotonic()))
        tell = self._step("watching", self._wishes.watch_seconds)
        least = _STEADY * sum(len(one.numbers) for one in estimate.holdings.values())
        before = 0
        while True:
            hot = {
                pid: within(one.numbers, watches[pid]())
                for pid, one in estimate.holdings.items()
            }
            count = sum(int(flags.sum()) for flags in hot.values())
            now = time.monotonic()
            if now >= stop or count - before <= least:
                return hot
            before = count
            tell(_LOOK_SECONDS)
            time.sleep(min(_LOOK_SECONDS, stop - now))

    def _share(self, estimate: Estimate) -> None:
        for pid in self._spaces:
            self._outcomes[pid].pss_before = status.pss(pid)
        in_place = None if self._store else self._engine_in_place(estimate)
        for pid, space in self._spaces.items():
            outcome = self._outcomes[pid]
            spans: list[Span] = []
            with failures_of(outcome):
                spans = self._cold(pid, estimate.twins(pid))
            pages = sum(span.pages for span in spans)
            tell = self._step(f"merging {pid}", pages)
            engine = in_place or self._pool_engine(estimate, pid)
            with failures_of(outcome):
                if self._store:
                    regrant(space, self._store)
                with self._granted():
                    outcome.report = merge_all(space, spans, engine=engine)
            tell(pages)
            outcome.report.refuse(HOT, outcome.hot_bytes // PAGE_SIZE)
        if in_place:
            self._finish(in_place)
        for pid in self._spaces:
            self._outcomes[pid].pss_after = status.pss(pid)

    def _granted(self) -> contextlib.AbstractContextManager[object]:
        """Be able to map slots, under a grant that no other process has."""
        if not self._store:
            return contextlib.nullcontext()
        self._store.let_go()
        return self._store.granted()

    def _pool_engine(self, estimate: Estimate, pid: int) -> Engine:
        assert self._store is not None
        return PoolEngine(self._store, estimate.holdings[pid].names)

    def _engine_in_place(self, estimate: Estimate) -> Engine:
        name = next(iter(self._outcomes.values())).engine
        if name == choice.KERNEL:
            return KernelEngine()
        worth = [estimate.worth(pid) for pid in self._spaces]
        wanted = sum(one.twin_bytes + one.zero_bytes for one in worth) // PAGE_SIZE
        return KsmEngine(runtime.directory() / ksm.STATE_NAME, wanted=wanted)

    def _finish(self, engine: Engine) -> None:
        work = "ksmd works" if engine.name == choice.KSM else "counting what was merged"
        tell = self._step(work, 1.0)
        try:
            for pid, report in engine.finish().items():
                self._outcomes[pid].report += report
        except SksmError as error:
            for outcome in self._outcomes.values():
                outcome.error = outcome.error or error
        tell(1.0)

    def _cold(self, pid: int, spans: list[Span]) -> list[Span]:
        """Leave the hot pages out of spans that go across them."""
        hot = self._hot.get(pid, np.empty(0, np.int64))
        kernel = np.array(sorted(self._spaces[pid].kernel_pages()), np.int64)
        numbers = pages_of(spans)
        return spans_of(numbers[~np.isin(numbers, np.concatenate([hot, kernel]))])


def _estimate(store: Store | None) -> Estimate:
    if store is None:
        return Estimate()
    return Estimate(seed=store.seed, known=store.knows, pool=store.name)
