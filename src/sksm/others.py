"""What an operator does to programs that know nothing of it: merge, and undo it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import psutil

from sksm.daemon.client import RemoteStore
from sksm.engines.pool import PoolEngine
from sksm.errors import DaemonUnreachable, ProcessGone, SksmError
from sksm.estimate import Estimate, Worth
from sksm.linux import libc, maps
from sksm.linux.maps import Mapping
from sksm.pages import is_pool, why_not
from sksm.pipeline import merge_all
from sksm.process import (
    EXCHANGE_PAGES,
    domain,
    guards,
    pages_of,
    permission,
    runtimes,
    spans_of,
    status,
)
from sksm.process.domain import Domain
from sksm.process.other import EVERYTHING, OtherProcess
from sksm.process.watching import WriteWatch
from sksm.report import MergeReport, Step
from sksm.spans import PAGE_SIZE, Span, groups
from sksm.store import Store
from sksm.store.local import LocalStore
from sksm.twins import Flags

WATCH_SECONDS = 5.0  # at most, unless told otherwise
_LOOK_SECONDS = 0.3  # from one look to the next which pages were written to
_FEW = 0.01  # of all pages: so few hot ones do not change what else is worth it
_STEADY = 0.005  # of all pages: if fewer are new, the rest will mostly stay unwritten
HOT = "written to while it was watched"


@dataclasses.dataclass(slots=True)
class Outcome:
    """What became of one process."""

    pid: int
    name: str
    worth: Worth | None = None  # what was found in it
    report: MergeReport = dataclasses.field(default_factory=MergeReport)
    hot_bytes: int = 0  # with an equal page elsewhere, and left alone: written to
    stops: list[float] = dataclasses.field(default_factory=list)
    unmerged_bytes: int = 0  # private again
    refusal: str = ""  # why it was left alone as a whole
    error: SksmError | None = None
    pss_before: int = 0
    pss_after: int = 0

    @property
    def failed(self) -> bool:
        """Whether it was left alone, or given up."""
        return bool(self.refusal or self.error)


@dataclasses.dataclass(frozen=True, slots=True)
class Wishes:
    """How to merge."""

    watch_seconds: float = WATCH_SECONDS
    insist: bool = False  # merge by the pool even where freed memory may be missed
    dry_run: bool = False


def merge(pids: Sequence[int], wishes: Wishes, step: Step) -> list[Outcome]:
    """Merge what processes hold twice, each with others of its domain."""
    outcomes = {pid: Outcome(pid, status.name(pid)) for pid in pids}
    domains: dict[Domain, list[int]] = {}
    for pid, outcome in outcomes.items():
        with _failures_of(outcome):
            permission.require_memory(pid)
            outcome.refusal = _refusal(pid, wishes)
            if not outcome.refusal:
                domains.setdefault(domain.of(pid), []).append(pid)
    for whose, members in domains.items():
        with _store(whose) as store:
            crew = _Crew(store, [outcomes[pid] for pid in members], wishes, step)
            crew.merge()
    return list(outcomes.values())


def _refusal(pid: int, wishes: Wishes) -> str:
    if reason := guards.objection_to(pid):
        return reason
    return "" if wishes.insist else runtimes.doubt(pid) or ""


@contextlib.contextmanager
def _failures_of(outcome: Outcome) -> Iterator[None]:
    """Keep what goes wrong with one process from the others."""
    try:
        yield
    except SksmError as error:
        outcome.error = error
    except BlockingIOError as error:
        outcome.error = SksmError(f"process {outcome.pid}: {error}")
    except ConnectionError:
        raise
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # what it is, or may do, forbids it
            outcome.refusal = error.strerror or ""
        else:
            outcome.error = permission.explain(outcome.pid, error)


@contextlib.contextmanager
def _store(whose: Domain) -> Iterator[Store]:
    """Open the store of a domain; one of our own if no daemon can be had."""
    try:
        remote = RemoteStore(whose)
    except DaemonUnreachable:
        local = LocalStore()
        with contextlib.closing(local):
            yield local
    else:
        with contextlib.closing(remote):
            yield remote


class _Crew:
    """The processes of one domain, merged with each other and with its pool."""

    def __init__(
        self, store: Store, outcomes: list[Outcome], wishes: Wishes, step: Step
    ) -> None:
        self._store, self._wishes, self._step = store, wishes, step
        self._outcomes = {outcome.pid: outcome for outcome in outcomes}
        self._scope = contextlib.ExitStack()
        self._spaces: dict[int, OtherProcess] = {}
        self._hot: dict[int, npt.NDArray[np.int64]] = {}  # numbers of pages

    def merge(self) -> None:
        with self._scope, self._store.lease():
            for pid, outcome in self._outcomes.items():
                with _failures_of(outcome):
                    self._spaces[pid] = self._scope.enter_context(OtherProcess(pid))
            estimate = self._choose()
            if not self._wishes.dry_run:
                self._share(estimate)
        for pid, space in self._spaces.items():
            self._outcomes[pid].stops = list(space.stops)

    def _choose(self) -> Estimate:
        """Find what is worth merging: pages with twins that stay unwritten."""
        estimate = Estimate(
            seed=self._store.seed,
            known=self._store.lookup,
            pool=os.fstat(self._store.pool),
        )
        with contextlib.ExitStack() as scope:
            watches = self._watch(scope)
            started = time.monotonic()
            for pid, space in list(self._spaces.items()):
                with _failures_of(self._outcomes[pid]):
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

    def _watch(self, scope: contextlib.ExitStack) -> dict[int, WriteWatch]:
        if not self._wishes.watch_seconds or self._wishes.dry_run:
            return {}
        watches = {}
        for pid, space in list(self._spaces.items()):
            with _failures_of(self._outcomes[pid]):
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
        self, estimate: Estimate, watches: dict[int, WriteWatch], started: float
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
                pid: _flags(one.numbers, watches[pid].written())
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
            self._outcomes[pid].pss_before = pss(pid)
        for pid, space in self._spaces.items():
            outcome = self._outcomes[pid]
            spans: list[Span] = []
            with _failures_of(outcome):
                spans = self._cold(pid, estimate.twins(pid))
            pages = sum(span.pages for span in spans)
            tell = self._step(f"merging {pid}", pages)
            engine = PoolEngine(self._store, estimate.holdings[pid].names)
            with _failures_of(outcome):
                outcome.report = merge_all(space, spans, engine=engine)
            for each in self._spaces.values():
                each.settle()
            tell(pages)
            outcome.report.refuse(HOT, outcome.hot_bytes // PAGE_SIZE)
        for pid in self._spaces:
            self._outcomes[pid].pss_after = pss(pid)

    def _cold(self, pid: int, spans: list[Span]) -> list[Span]:
        """Leave the hot pages out of spans that go across them."""
        hot = self._hot.get(pid, np.empty(0, np.int64))
        kernel = np.array(sorted(self._spaces[pid].kernel_pages()), np.int64)
        numbers = pages_of(spans)
        return spans_of(numbers[~np.isin(numbers, np.concatenate([hot, kernel]))])


def unmerge(pids: Sequence[int], step: Step) -> list[Outcome]:
    """Give processes private memory again in the place of what they share.

    Raises:
        SksmError: there is not enough memory, and nothing was done.
    """
    outcomes = [Outcome(pid, status.name(pid)) for pid in pids]
    shared: dict[int, list[Mapping]] = {}
    for outcome in outcomes:
        with _failures_of(outcome):
            permission.require_memory(outcome.pid)
            found = maps.mappings(outcome.pid, EVERYTHING)  # with flags: to be kept
            shared[outcome.pid] = [mapping for mapping in found if is_pool(mapping)]
    wanted = sum(m.span.size for mappings in shared.values() for m in mappings)
    available = psutil.virtual_memory().available
    if wanted > available:
        raise SksmError(
            f"un-merging needs {wanted} bytes of memory, and only {available} are "
            "available: end something, or name fewer processes"
        )
    for outcome in outcomes:
        if mappings := shared.get(outcome.pid):
            tell = step(
                f"un-merging {outcome.pid}", sum(m.span.pages for m in mappings)
            )
            outcome.pss_before = pss(outcome.pid)
            with _failures_of(outcome):
                _privatise(outcome, mappings, tell)
            outcome.pss_after = pss(outcome.pid)
    return outcomes


def _privatise(
    outcome: Outcome, mappings: list[Mapping], tell: Callable[[float], None]
) -> None:
    if reason := guards.objection_to(outcome.pid):
        outcome.refusal = reason
        return
    with OtherProcess(outcome.pid) as space:
        try:
            for mapping in mappings:
                for (piece,) in groups([mapping.span], EXCHANGE_PAGES):
                    space.privatise(
                        piece, mapping.prot, not_forked="dc" in mapping.flags
                    )
                    outcome.unmerged_bytes += piece.size
                    tell(piece.pages)
        finally:
            outcome.stops = list(space.stops)


def pss(pid: int) -> int:
    """Read the memory a process accounts for, its share of shared pages included.

    `Pss` of /proc/PID/smaps_rollup, in bytes; 0 if it ended.
    """
    with contextlib.suppress(OSError):
        return status.sizes(f"/proc/{pid}/smaps_rollup").get("Pss", 0)
    return 0


def _flags(numbers: npt.NDArray[np.int64], spans: list[Span]) -> Flags:
    """Say which of ascending page numbers lie in `spans`."""
    flags = np.zeros(len(numbers), bool)
    for span in spans:
        first, stop = np.searchsorted(
            numbers, [span.start // PAGE_SIZE, span.stop // PAGE_SIZE]
        )
        flags[first:stop] = True
    return flags
