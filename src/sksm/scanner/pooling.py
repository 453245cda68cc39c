"""Watched processes that share the pages of a pool."""

from __future__ import annotations

import contextlib
import time

import numpy as np

from sksm.daemon import client
from sksm.engines.pool import PoolEngine
from sksm.holding import Prints
from sksm.outcomes import failures_of
from sksm.process.domain import Domain
from sksm.regranting import is_worth_it
from sksm.scanner.ages import Numbers
from sksm.scanner.group import Group
from sksm.scanner.watched import Watched
from sksm.spans import PAGE_SIZE
from sksm.store import Store

_LOOKUP_PAGES = 4096
_MANY_PAGES = 256  # that left the pool: a MiB
_LOOK_SECONDS = 5.0  # from one look for dead slots to the next, at least


class PoolGroup(Group):
    """Processes that are merged into the store of their domain."""

    def __init__(self, domain: Domain) -> None:
        super().__init__(domain)
        self._scope = contextlib.ExitStack()
        self._gone = 0  # pages of members there were, which showed the pool
        self._given_back = 0  # of all that left it, when slots were freed last
        self._look_at = 0.0
        self._regranted: dict[int, int] = {}  # pages that had left the pool by then
        self._opened: Store | None = None

    def close(self) -> None:
        """Let go of the store."""
        self._scope.close()
        self._opened = self.keeper = None

    @property
    def seed(self) -> int:
        """That of the store."""
        return self.store.seed

    @property
    def shared_bytes(self) -> int:
        """Memory that the pool occupies."""
        return self._opened.pool_bytes() if self._opened else 0

    def merged_pages(self, member: Watched) -> int:
        """Count the pages of a member that show the pool."""
        return member.pages.merged()

    @property
    def store(self) -> Store:
        """The store; another one if the daemon has been replaced."""
        if self._opened is None or not self._opened.alive():
            self._scope.close()
            self._opened = self._scope.enter_context(client.opened(self.domain))
            self.keeper = self._opened.keeper
            self._pooled = np.empty(0, np.uint64)
            for member in self.members.values():
                member.pages.forget_prints()  # they were made with another seed
        return self._opened

    def remove(self, pid: int) -> Watched:
        """Let go of a member; gives it, to be closed."""
        member = super().remove(pid)
        self._gone += member.unmerged + member.pages.merged()
        self._regranted.pop(pid, None)
        return member

    def give_back(self, now: float) -> None:
        """Have slots freed if many pages have left the pool since the last time.

        The daemon would look for them later: it is not told of writes.
        """
        gone = self._gone + sum(member.unmerged for member in self.members.values())
        left = gone - self._given_back
        if left < _MANY_PAGES or now < self._look_at or not self._opened:
            return
        before, began = self.shared_bytes, time.monotonic()
        for pid, member in self.members.items():
            dead = member.unmerged - self._regranted.get(pid, 0)
            if is_worth_it(dead, dead + member.pages.merged()):
                with failures_of(member.outcome):
                    member.regrant(self.store)
                self._regranted[pid] = member.unmerged
        self.store.give_back()
        took = time.monotonic() - began
        much = before - self.shared_bytes >= left * PAGE_SIZE / 4
        self._given_back = gone
        self._look_at = now + (
            _LOOK_SECONDS if much else max(_LOOK_SECONDS, 100 * took)
        )

    def _offer(self, member: Watched, numbers: Numbers, now: float) -> None:
        """Merge under a grant that no other member has: each parts with its slots."""
        self.store.let_go()
        with self.store.granted():
            member.share(numbers, PoolEngine(self.store, member.pages.names), now)
        self.store.let_go()

    def _room(self, member: Watched, now: float) -> int:
        return member.room(now)

    def _note(self, prints: Prints) -> None:
        store, found = self.store, [self._pooled]
        for first in range(0, len(prints), _LOOKUP_PAGES):
            some = prints[first : first + _LOOKUP_PAGES]
            found.append(some[store.knows(some)])
        self._pooled = np.unique(np.concatenate(found))
