"""Processes that may share with each other: what they hold twice, and merging it."""

from __future__ import annotations

import abc
import sys
import time
from collections.abc import Iterator

import numpy as np

from sksm.holding import Prints
from sksm.outcomes import failures_of
from sksm.process.domain import Domain
from sksm.scanner import candidates
from sksm.scanner.ages import Numbers
from sksm.scanner.watched import FEW_PAGES, Watched

_MERGE_RATE = 25_000.0  # pages in a second of processor time, until it was measured
NEVER = float("inf")
AGAIN_SECONDS = 15.0
_NOTHING: tuple[Numbers, Prints] = np.empty(0, np.int64), np.empty(0, np.uint64)


class Group(abc.ABC):
    """Watched processes of one domain that are merged by one engine.

    Args:
        domain: theirs.

    Attributes:
        again_at: when what was put off may be worth it.
        keeper: the process that holds what they share, if there is one.
        engine_seconds: processor time that others than us and that one took for it.
    """

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.members: dict[int, Watched] = {}
        self.again_at = NEVER
        self.keeper: int | None = None
        self.engine_seconds = 0.0
        self._rate = _MERGE_RATE
        self._pooled: Prints = np.empty(0, np.uint64)  # ascending: can be merged alone

    @property
    @abc.abstractmethod
    def seed(self) -> int:
        """Of the fingerprints."""

    @property
    @abc.abstractmethod
    def shared_bytes(self) -> int:
        """Memory that is taken by what they share, once for all of them."""

    @abc.abstractmethod
    def merged_pages(self, member: Watched) -> int:
        """Count the pages of a member that are merged."""

    @abc.abstractmethod
    def _offer(self, member: Watched, numbers: Numbers, now: float) -> None:
        """Merge pages of a member, ascending."""

    def _room(self, member: Watched, now: float) -> int:
        """Say how many pages of a member may be merged now."""
        return sys.maxsize

    def close(self) -> None:  # noqa: B027  most hold nothing
        """Let go of what holds what they share."""

    def give_back(self, now: float) -> None:  # noqa: B027  most take nothing
        """Have memory freed that is shared by nobody any more."""

    def remove(self, pid: int) -> Watched:
        """Let go of a member; gives it, to be closed."""
        return self.members.pop(pid)

    def read(self, member: Watched) -> Iterator[int]:
        """Read what is due of a member, some at a time; gives how many pages."""
        for prints in member.read(self.seed):
            self._note(prints)
            yield len(prints)

    def _note(self, prints: Prints) -> None:  # noqa: B027  most know no others
        """See which pages that were read have an equal one outside of the members."""

    def _remember(self, member: Watched, numbers: Numbers) -> None:
        """Note that pages are merged, so that one more like them is worth it."""
        self._pooled = np.union1d(self._pooled, member.pages.prints(numbers))

    def find(self) -> dict[int, Numbers]:
        """List the pages of each member that are worth merging now."""
        seed = self.seed
        named = {pid: one.pages.named() for pid, one in self.members.items()}
        if not any(len(numbers) for numbers, _ in named.values()):
            return {}
        flags = candidates.met(named, self._pooled, seed)
        likely: dict[int, tuple[Numbers, Prints]] = {}
        frames: dict[int, Prints] = {}
        for pid, (numbers, prints) in named.items():
            some, likely[pid] = numbers[flags[pid]], _NOTHING
            frames[pid] = _NOTHING[1]
            with failures_of(self.members[pid].outcome):
                there, frames[pid] = self.members[pid].present(some)
                likely[pid] = some[there], prints[flags[pid]][there]
        wanted = candidates.worthwhile(likely, frames, self._pooled, seed)
        for pid, numbers in wanted.items():
            member = self.members[pid]
            member.twin_pages = len(numbers)
            with failures_of(member.outcome):
                wanted[pid] = numbers[~member.unbroken(numbers)]
        return wanted

    def merge(self, wanted: dict[int, Numbers], seconds: float, now: float) -> int:
        """Merge pages of members, the most promising ones first.

        Args:
            wanted: their pages.
            seconds: of processor time that there are for it.
            now: what time it is, in seconds.

        Returns:
            How many were offered.
        """
        room = max(0, int(seconds * self._rate))
        self.again_at = NEVER
        began, offered = time.process_time(), 0
        for pid in sorted(wanted, key=lambda pid: -len(wanted[pid])):
            member = self.members[pid]
            numbers = wanted[pid][: min(room, self._room(member, now))]
            if len(numbers) >= member.enough(now):
                self._remember(member, numbers)
                with failures_of(member.outcome):
                    self._offer(member, numbers, now)
                offered += len(numbers)
                room -= len(numbers)
            if len(wanted[pid]) >= FEW_PAGES:
                unfinished = len(numbers) < len(wanted[pid])
                again_at = now if unfinished else now + AGAIN_SECONDS
                self.again_at = min(self.again_at, again_at)
        if offered:
            rate = offered / max(time.process_time() - began, 1e-3)
            self._rate = (self._rate + rate) / 2
        return offered
