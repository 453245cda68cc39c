"""The processes that may share with each other, and the store they share by."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import numpy as np

from sksm.daemon import client
from sksm.holding import Prints
from sksm.outcomes import failures_of
from sksm.process.domain import Domain
from sksm.scanner import candidates
from sksm.scanner.ages import Numbers
from sksm.scanner.watched import FEW_PAGES, Watched
from sksm.store import UNSEEN, Store

_LOOKUP_PAGES = 4096
_MERGE_RATE = 25_000.0  # pages in a second of processor time, until it was measured
_NEVER = float("inf")
_AGAIN_SECONDS = 15.0
_MANY_PAGES = 256  # that left the pool: a MiB
_LOOK_SECONDS = 5.0  # from one look for dead slots to the next, at least
_NOTHING: tuple[Numbers, Prints] = np.empty(0, np.int64), np.empty(0, np.uint64)


class Group:
    """Watched processes of one domain.

    Args:
        domain: theirs.
    """

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.members: dict[int, Watched] = {}
        self._scope = contextlib.ExitStack()
        self.again_at = _NEVER  # when what was put off may be worth it
        self._rate = _MERGE_RATE
        self._gone = 0  # pages of members there were, which showed the pool
        self._given_back = 0  # of all that left it, when slots were freed last
        self._looked_at = -_LOOK_SECONDS
        self._opened: Store | None = None
        self._pooled: Prints = np.empty(0, np.uint64)  # ascending, of what was read

    def close(self) -> None:
        """Let go of the store."""
        self._scope.close()
        self._opened = None

    @property
    def keeper(self) -> int | None:
        """The process that holds the store, if one is open."""
        return self._opened.keeper if self._opened else None

    @property
    def pool_bytes(self) -> int:
        """Memory that the pool occupies."""
        return os.fstat(self._opened.pool).st_blocks * 512 if self._opened else 0

    @property
    def store(self) -> Store:
        """The store; another one if the daemon has been replaced."""
        if self._opened is None or not self._opened.alive():
            self._scope.close()
            self._opened = self._scope.enter_context(client.opened(self.domain))
            self._pooled = np.empty(0, np.uint64)
            for member in self.members.values():
                member.pages.forget_prints()  # they were made with another seed
        return self._opened

    def remove(self, pid: int) -> Watched:
        """Let go of a member; gives it, to be closed."""
        member = self.members.pop(pid)
        self._gone += member.unmerged + member.pages.merged()
        return member

    def give_back(self, now: float) -> None:
        """Have slots freed if many pages have left the pool since the last time.

        The daemon would look for them later: it is not told of writes.
        """
        left = self._gone + sum(member.unmerged for member in self.members.values())
        many = left - self._given_back >= _MANY_PAGES
        if many and now >= self._looked_at + _LOOK_SECONDS and self._opened:
            self._given_back, self._looked_at = left, now
            self.store.give_back()

    def read(self, member: Watched) -> Iterator[int]:
        """Read what is due of a member, some at a time; gives how many pages."""
        store = self.store
        for prints in member.read(store.seed):
            found = [self._pooled]
            for first in range(0, len(prints), _LOOKUP_PAGES):
                some = prints[first : first + _LOOKUP_PAGES]
                found.append(some[store.lookup(some) != UNSEEN])
            self._pooled = np.unique(np.concatenate(found))
            yield len(prints)

    def find(self) -> dict[int, Numbers]:
        """List the pages of each member that are worth merging now."""
        seed = self.store.seed
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
        self.again_at = _NEVER
        began, offered, store = time.process_time(), 0, self.store
        with store.lease():
            for pid in sorted(wanted, key=lambda pid: -len(wanted[pid])):
                numbers = wanted[pid][:room]
                if len(numbers) >= self.members[pid].enough(now):
                    self._offer(self.members[pid], numbers, store, now)
                    offered += len(numbers)
                    room -= len(numbers)
                if len(wanted[pid]) >= FEW_PAGES:
                    unfinished = len(numbers) < len(wanted[pid])
                    again_at = now if unfinished else now + _AGAIN_SECONDS
                    self.again_at = min(self.again_at, again_at)
        if offered:
            rate = offered / max(time.process_time() - began, 1e-3)
            self._rate = (self._rate + rate) / 2
        return offered

    def _offer(
        self, member: Watched, numbers: Numbers, store: Store, now: float
    ) -> None:
        self._pooled = np.union1d(self._pooled, member.pages.prints(numbers))
        with failures_of(member.outcome):
            member.share(numbers, store, now)
