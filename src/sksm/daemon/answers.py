"""What the daemon does with its store for its clients."""

from __future__ import annotations

import logging
import os
import time

import numpy as np

from sksm.daemon import protocol
from sksm.daemon.protocol import Malformed
from sksm.daemon.sweeper import Sweeper
from sksm.process import status
from sksm.process.domain import Domain
from sksm.spans import PAGE_SIZE, Span
from sksm.store import UNSEEN, Offered
from sksm.store.alone import APART
from sksm.store.grants import Grant, Grants
from sksm.store.local import LocalStore

_log = logging.getLogger("sksmd")


class Answers:
    """Answers requests that concern the store.

    Args:
        store: whose only writer this process is.
        grants: of that store.
        sweeper: told of what comes in.
        domain: whose memory it holds.
    """

    def __init__(
        self, store: LocalStore, grants: Grants, sweeper: Sweeper, domain: Domain
    ) -> None:
        self._store, self._grants = store, grants
        self._sweeper, self._domain = sweeper, domain
        self._began = time.monotonic()

    def look_up(self, grant: Grant | None, request: protocol.Lookup) -> protocol.Slots:
        """Say which slots have some fingerprints, and give them to a grant."""
        prints = protocol.integers(request.prints).view(np.uint64)
        slots = self._store.lookup(prints)
        if not request.only_asked:
            self._grants.add(self._living(grant), slots)
        return protocol.Slots(slots.tobytes())

    def claim(self, grant: Grant | None, request: protocol.Claim) -> protocol.Claimed:
        """Give slots in a row to a grant, if all of them are in use."""
        first, pages = request.slot, request.pages
        if first < 0 or not 0 < pages <= protocol.MOST_PAGES:
            raise Malformed("slots out of bounds")
        # Behind a slot that stands alone lies nothing.
        given = first + pages <= APART and self._store.claim(first, pages)
        if given:
            runs = np.array([[first, first + pages]], np.int64)
            self._grants.add_runs(self._living(grant), runs)
        return protocol.Claimed(given)

    def settle(self, grant: Grant | None, request: protocol.Settle) -> None:
        """Take back from a grant what its holder has not mapped."""
        pairs = protocol.integers(request.runs).reshape(-1, 2)
        if (pairs[:, 1] <= 0).any() or (pairs.size and int(pairs.max()) > 2**61):
            raise Malformed("runs of slots out of bounds")
        mapped = np.stack([pairs[:, 0], pairs.sum(axis=1)], axis=1)
        if grant is None:
            raise Malformed("slots without a grant")
        self._grants.settle(grant, None if request.everything else mapped)

    def take(
        self, grant: Grant | None, client: int, request: protocol.Offer
    ) -> protocol.Offered:
        """Take pages of a client, or of somebody else for whom it asks.

        Raises:
            Malformed: there are no such pages.
        """
        pairs = protocol.integers(request.runs).reshape(-1, 2)
        pages = int(pairs[:, 1].sum()) if (pairs > 0).all() else 0
        if not 0 < pages <= protocol.MOST_PAGES or int(pairs.max()) > 2**51:
            raise Malformed("page runs out of bounds")
        spans = [
            Span(first * PAGE_SIZE, (first + count) * PAGE_SIZE)
            for first, count in pairs.tolist()
        ]
        holder = self._living(grant)
        try:
            if request.pid:
                found = self._take_of_other(request.pid, spans, request.alone)
            else:
                found = self._store.offer(client, spans, alone=request.alone)
            slots, fresh, refusal = found
        except (OSError, MemoryError) as error:
            who = request.pid or client
            _log.exception("cannot take %d pages of process %d", pages, who)
            slots, fresh = np.full(pages, UNSEEN, np.int64), np.zeros(pages, bool)
            refusal = f"the daemon could not take it: {error or 'no memory'}"
        self._grants.add(holder, slots)
        self._sweeper.pages_came(int(fresh.sum()))
        return protocol.Offered(slots.tobytes(), fresh.tobytes(), refusal)

    def _take_of_other(self, pid: int, spans: list[Span], alone: bool) -> Offered:
        """Take pages of a process that is no client, if it belongs to the domain.

        It must before and afterwards: meanwhile it may have become another's, or
        have ended, and its number been given to somebody else.
        """
        if not self._domain.admits(pid):
            pages = sum(span.pages for span in spans)
            slots, fresh = np.full(pages, UNSEEN, np.int64), np.zeros(pages, bool)
            return slots, fresh, f"it does not belong to domain {self._domain.name}"
        slots, fresh, refusal = self._store.offer(pid, spans, alone=alone)
        if not self._domain.admits(pid):
            self._store.drop(np.unique(slots[fresh]))
            slots[:], fresh[:] = UNSEEN, False
        return slots, fresh, refusal

    def status(self, reclaim: bool, clients: int) -> protocol.Status:
        """Say how things stand; with `reclaim`, after freeing what nobody maps."""
        if reclaim:
            self._sweeper.run(again=bool(clients))
        return protocol.Status(
            pid=os.getpid(),
            clients=clients,
            **self._store.usage(),
            own_bytes=status.own_bytes(os.getpid()),
            grants=len(self._grants),
            reclaimed=self._sweeper.reclaimed,
            held_back=self._sweeper.held_back,
            seconds=time.monotonic() - self._began,
        )

    def _living(self, grant: Grant | None) -> Grant:
        """Return a grant that keeps what it is given."""
        if grant is None or not self._grants.knows(grant):
            raise Malformed("slots without a grant")
        return grant
