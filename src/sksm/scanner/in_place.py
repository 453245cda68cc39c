"""Watched processes that the kernel merges: by MADV_MERGE, or by ksmd when told to.

They keep their mappings, and no store of ours holds what they share. KSM looks at all
that is marked for it, page by page, and takes as long as that is. So it is set to
work when enough has come together to be worth that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sksm.engines import choice
from sksm.engines.kernel import KernelEngine
from sksm.engines.ksm import Task, work
from sksm.errors import NotToBeShared
from sksm.fingerprints import new_seed
from sksm.linux import ksm
from sksm.outcomes import failures_of
from sksm.process.domain import Domain
from sksm.scanner.ages import Numbers
from sksm.scanner.group import AGAIN_SECONDS, NEVER, Group
from sksm.scanner.watched import FEW_PAGES, Watched
from sksm.spans import PAGE_SIZE

_ITEM_BYTES = 64  # of each page that ksmd has looked at: struct ksm_rmap_item
_SECONDS_A_PAGE = 10e-6  # for ksmd to look at it three times, until it was measured
_PAGES_A_SECOND = 5_000.0  # merged by ksmd, in a second of its time: else it waits
_PATIENCE_SECONDS = 120.0
_LEAST_SECONDS, _LONGEST_SECONDS = 0.25, 20.0  # that ksmd works at one go


class KernelGroup(Group):
    """Processes whose pages are merged by MADV_MERGE.

    If it came to share them with somebody with whom they may not, they are let go.

    Args:
        domain: theirs.
        admits: says which processes may share with them.
    """

    name = choice.KERNEL

    def __init__(self, domain: Domain, admits: Callable[[int], bool]) -> None:
        super().__init__(domain)
        self._admits = admits
        self._seed = new_seed()
        self._offered: dict[int, Numbers] = {}  # in this merge

    @property
    def seed(self) -> int:
        """Our own: nobody else fingerprints these pages."""
        return self._seed

    @property
    def shared_bytes(self) -> int:
        """Memory of what KSM shares, on the whole machine, and of its own notes."""
        items = sum(
            _stat(member).get("ksm_rmap_items", 0) for member in self.members.values()
        )
        shared = ksm.figures().get("pages_shared", 0)
        return shared * PAGE_SIZE + items * _ITEM_BYTES

    def merged_pages(self, member: Watched) -> int:
        """Count the pages of a member that are merged, as the kernel does."""
        return ksm.merged_in(_stat(member))

    def merge(self, wanted: dict[int, Numbers], seconds: float, now: float) -> int:
        """Merge pages as others do; nothing if that might cross domains.

        What is merged is seen when all of it was offered: the first of two twins is
        when the other one comes.
        """
        if any(map(len, wanted.values())) and self._let_go_of_all():
            return 0
        self._offered.clear()
        offered = super().merge(wanted, seconds, now)
        for pid, numbers in self._offered.items():
            with failures_of(self.members[pid].outcome):
                self.members[pid].settle(numbers, done=True)
        return offered

    def _let_go_of_all(self) -> bool:
        """Let the members go if they must not share with all whom KSM knows."""
        reason = choice.stranger(self._admits, self.name)
        if reason:
            for member in self.members.values():
                member.outcome.error = NotToBeShared(reason)
        return bool(reason)

    def _offer(self, member: Watched, numbers: Numbers, now: float) -> None:
        self._offered[member.pid] = numbers
        member.offer(numbers, KernelEngine(), now)


class KsmGroup(KernelGroup):
    """Processes whose pages are merged by ksmd, when it is worth having it work.

    Args:
        domain, admits: as for `KernelGroup`.
        state: where the knobs of ksmd are written down while they are borrowed.
    """

    name = choice.KSM

    def __init__(
        self, domain: Domain, admits: Callable[[int], bool], state: Path
    ) -> None:
        super().__init__(domain, admits)
        self._state = state
        self._seconds_a_page = _SECONDS_A_PAGE
        self._task: Task | None = None  # that ksmd had no time to finish
        self._task_seconds = 0.0  # of ksmd, so far
        self._worked_at: float | None = None

    def merge(self, wanted: dict[int, Numbers], seconds: float, now: float) -> int:
        """Have ksmd merge all of it; nothing if that is not worth its time."""
        wanted = {pid: numbers for pid, numbers in wanted.items() if len(numbers)}
        pages = sum(map(len, wanted.values()))
        self.again_at = now + AGAIN_SECONDS if pages >= FEW_PAGES else NEVER
        seen = sum(member.pages.seen() for member in self.members.values())
        cost = seen * self._seconds_a_page
        if seconds < min(cost, _LEAST_SECONDS) or pages < self._enough(cost, now):
            return 0
        if self._let_go_of_all():
            return 0
        for pid, numbers in wanted.items():
            self._remember(self.members[pid], numbers)
            with failures_of(self.members[pid].outcome):
                self.members[pid].mark(numbers)
        done = self._work(set(wanted), pages, min(seconds, _LONGEST_SECONDS))
        if done:
            self._worked_at, self._seconds_a_page = now, self._task_seconds / seen
        else:
            self.again_at = now
        for pid, numbers in wanted.items():
            with failures_of(self.members[pid].outcome):
                self.members[pid].settle(numbers, done=done)
        return pages

    def _work(self, pids: set[int], pages: int, seconds: float) -> bool:
        """Have ksmd work; whether it has looked at everything as often as it must."""
        if self._task is None or not pids <= self._task.pids:
            self._task, self._task_seconds = Task(pids, pages), 0.0
        before = ksm.cpu_seconds() or 0.0
        try:
            done = work(self._state, self._task, seconds)
        finally:
            used = (ksm.cpu_seconds() or 0.0) - before
            self.engine_seconds += used
            self._task_seconds += used
        if done:
            self._task = None
        return done

    def _enough(self, cost: float, now: float) -> float:
        """Say for how many pages it is worth so much time of ksmd.

        None waits for ever.
        """
        waited = now - (now if self._worked_at is None else self._worked_at)
        patience = max(0.0, 1.0 - waited / _PATIENCE_SECONDS)
        return max(FEW_PAGES, cost * _PAGES_A_SECOND * patience)


def _stat(member: Watched) -> dict[str, int]:
    try:
        return ksm.stat(member.pid)
    except OSError:  # it has ended, which the next look will tell
        return {}
