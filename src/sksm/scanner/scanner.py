"""The scanner: epoch after epoch, what is quiet and has a twin is merged."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable

from sksm.daemon import runtime
from sksm.engines import choice
from sksm.errors import Busy, DaemonUnreachable, NotToBeShared, ProcessGone, SksmError
from sksm.linux import ksm, libc
from sksm.outcomes import Outcome, failures_of
from sksm.process import domain, status
from sksm.process.domain import Domain
from sksm.scanner.budget import Budget
from sksm.scanner.group import Group
from sksm.scanner.in_place import KernelGroup, KsmGroup
from sksm.scanner.pooling import PoolGroup
from sksm.scanner.watched import Watched

_SELECT_SECONDS = 2.0  # from one look for processes to the next
_NEWS = 0.001  # of all pages: fewer that became due are no news
_LIVELY = 5  # times as many that were written to are: they will come to rest
# To be tried again.
_PASSING = (Busy, ProcessGone, DaemonUnreachable, NotToBeShared)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """How a process is to be watched."""

    guest_only: bool = False  # it emulates a machine, and only that one's memory counts
    domain: Domain | None = None  # with whom it shares, if not with its own user's


@dataclasses.dataclass(slots=True)
class Epoch:
    """What one epoch did, and cost."""

    number: int
    looking_seconds: float = 0.0  # of processor time
    read_pages: int = 0
    offered_pages: int = 0  # that were worth merging


class Scanner:
    """Watches processes and merges what they hold twice.

    Args:
        select: gives the processes to watch now.
        quiet_seconds: how long a page must be unwritten.
        clock: says what time it is, in seconds.
        engine: one that somebody insists on, as `choice.choose` takes it.

    Attributes:
        budget: processor time, and pauses; all of one processor at first.
    """

    def __init__(
        self,
        select: Callable[[], dict[int, Target]],
        quiet_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        engine: str = choice.AUTO,
    ) -> None:
        self.groups: dict[tuple[Domain, str], Group] = {}  # by the engine, too
        self.refused: dict[int, Outcome] = {}
        self.postponed: dict[int, Outcome] = {}  # could not be watched, tried again
        self._select, self._quiet, self._engine = select, quiet_seconds, engine
        self._targets: dict[int, Target] = {}
        self.budget = Budget(1.0, time.process_time, clock)
        self._select_at = 0.0
        self._clock = clock
        self._looked_at = clock()
        self._count = 0
        self.pause = 0.0  # seconds until the next epoch should begin

    def close(self) -> None:
        """Watch nobody any more. What is merged stays merged."""
        for group in self.groups.values():
            for member in group.members.values():
                member.close()
            group.close()
        self.groups.clear()

    def await_quiet(self, seconds: float) -> None:
        """Have pages stay unwritten as long as that, also those that are known."""
        self._quiet = seconds
        for group in self.groups.values():
            for member in group.members.values():
                member.pages.await_quiet(seconds)

    def merge_by(self, engine: str) -> None:
        """Merge by another engine from the next epoch on; begins anew if it is one."""
        if engine == self._engine:
            return
        self._engine = engine
        self.refused.clear()
        self.postponed.clear()
        self._select_at = 0.0
        for group in self.groups.values():
            for pid in list(group.members):
                group.remove(pid).close()

    def epoch(self) -> Epoch:
        """Look at everybody once, and do what is worth it."""
        self._count += 1
        done = Epoch(self._count)
        came = self._follow()
        began, written = time.process_time(), 0
        now = self._clock()
        for group in self.groups.values():
            for member in group.members.values():
                with failures_of(member.outcome):
                    written += member.look(now - self._looked_at)
        self._looked_at = now
        self._drop_failed()
        done.looking_seconds = time.process_time() - began
        for group in list(self.groups.values()):
            try:
                self._work(group, done)
                group.give_back(now)
            except (ConnectionError, SksmError) as error:  # of the store
                _log.warning("domain %s: %s", group.domain.name, error)
                group.close()
        self._drop_failed()
        if done.read_pages or done.offered_pages:
            libc.trim()  # that takes some, merging tens of MiB, for a moment
        many = max(1.0, _NEWS * self._seen())
        lively = done.read_pages >= many or written >= _LIVELY * many
        news = came or done.offered_pages > 0 or lively
        # The first look at a process costs more than any other.
        cost = 0.0 if came else done.looking_seconds
        self.pause = self.budget.pause(news=news, cost=cost)
        return done

    def _seen(self) -> int:
        """Count the pages that there are."""
        return sum(
            member.pages.seen()
            for group in self.groups.values()
            for member in group.members.values()
        )

    def _work(self, group: Group, done: Epoch) -> None:
        if self.budget.left() <= 0:
            return
        read = 0
        for member in group.members.values():
            with failures_of(member.outcome):
                for pages in group.read(member):
                    read += pages
                    if self.budget.left() <= 0:
                        break
        done.read_pages += read
        now = self._clock()
        if read or now >= group.again_at:
            wanted = group.find()
            done.offered_pages += group.merge(wanted, self.budget.left(), now)

    def _follow(self) -> bool:
        """See who came and went; say whether somebody came."""
        now = self._clock()
        if now < self._select_at:
            return False
        self._select_at = now + _SELECT_SECONDS
        targets = self._targets = self._select()
        for group in self.groups.values():
            for pid in group.members.keys() - targets.keys():
                group.remove(pid).close()
        for failed in (self.refused, self.postponed):
            for pid in failed.keys() - targets.keys():
                del failed[pid]
        known = {pid for group in self.groups.values() for pid in group.members}
        new = targets.keys() - known - self.refused.keys()
        for pid in new:
            outcome = Outcome(pid, status.name(pid))
            with failures_of(outcome):
                self._add(pid, targets[pid], outcome)
            self.postponed.pop(pid, None)
            if outcome.failed:
                self._note_failed(outcome)
        return bool(new)

    def _note_failed(self, outcome: Outcome) -> None:
        passing = isinstance(outcome.error, _PASSING)
        (self.postponed if passing else self.refused)[outcome.pid] = outcome

    def _add(self, pid: int, target: Target, outcome: Outcome) -> None:
        whose = target.domain or domain.of(pid)
        engine, outcome.refusal = choice.choose(
            pid, self._engine, marked=_is_marked(pid), admits=self._admits(whose)
        )
        if outcome.refusal:
            return
        if (whose, engine) not in self.groups:
            self.groups[whose, engine] = self._group(whose, engine)
        member = Watched(pid, self._quiet, guest_only=target.guest_only)
        self.groups[whose, engine].members[pid] = member

    def _group(self, whose: Domain, engine: str) -> Group:
        if engine == choice.POOL:
            return PoolGroup(whose)
        insisted = self._engine != choice.AUTO  # who does knows that KSM has no users
        admits = (lambda _: True) if insisted else self._admits(whose)
        if engine == choice.KERNEL:
            return KernelGroup(whose, admits)
        return KsmGroup(whose, admits, runtime.directory() / ksm.STATE_NAME)

    def _admits(self, whose: Domain) -> Callable[[int], bool]:
        """Say of a process whether it may share in a domain.

        Into one for several users come those that are to be watched in it.
        """
        if not whose.group:
            return whose.admits
        return lambda pid: pid in self._targets and self._targets[pid].domain == whose

    def _drop_failed(self) -> None:
        for group in self.groups.values():
            for pid, member in list(group.members.items()):
                if member.outcome.failed:
                    group.remove(pid).close()
                    self._note_failed(member.outcome)


def _is_marked(pid: int) -> bool:
    """Say whether its owner marked memory of a process; False if nobody may know."""
    with contextlib.suppress(OSError):  # which `choose` has better words for
        return ksm.is_marked(pid)
    return False
