"""What the daemon does with its store for its clients."""

from __future__ import annotations

import logging
import os
import time

import numpy as np

from sksm.daemon import protocol
from sksm.daemon.protocol import Malformed
from sksm.daemon.reclaimer import Reclaimer
from sksm.process import status
from sksm.process.domain import Domain
from sksm.spans import PAGE_SIZE, Span
from sksm.store import UNSEEN, Offered
from sksm.store.local import LocalStore

_log = logging.getLogger("sksmd")


class Answers:
    """Answers requests that concern the store.

    Args:
        store: whose only writer this process is.
        reclaimer: told of what comes in.
        domain: whose memory it holds.
        born: when this process began, seconds since the epoch.
    """

    def __init__(
        self, store: LocalStore, reclaimer: Reclaimer, domain: Domain, born: float
    ) -> None:
        self._store, self._reclaimer = store, reclaimer
        self._domain, self._born = domain, born

    def look_up(self, request: protocol.Lookup) -> protocol.Slots:
        """Say which slots have some fingerprints."""
        prints = protocol.integers(request.prints).view(np.uint64)
        slots = self._store.lookup(prints)
        return protocol.Slots(slots.tobytes(), self._store.written)

    def take(self, client: int, request: protocol.Offer) -> protocol.Offered:
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
        if fresh.any():
            self._reclaimer.pages_came()
        return protocol.Offered(
            slots.tobytes(), fresh.tobytes(), refusal, self._store.written
        )

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
        """Say how things stand; with `reclaim`, after giving back what is dead."""
        if reclaim:
            self._reclaimer.run(again=bool(clients))
        return protocol.Status(
            pid=os.getpid(),
            clients=clients,
            **self._store.usage(),
            own_bytes=status.own_bytes(os.getpid()),
            reclaimed=self._reclaimer.reclaimed,
            held_back=self._reclaimer.held_back,
            seconds=time.time() - self._born,
        )
