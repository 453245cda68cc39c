"""When the daemon frees slots that nobody maps."""

from __future__ import annotations

import time

from sksm.linux import libc
from sksm.store.grants import Grants
from sksm.store.local import LocalStore

_AFTER_A_CLIENT = 0.5  # seconds from the end of a client to looking for its slots
_AFTER_NEW_PAGES = 30.0  # and half as often each time that nothing was found
_LONGEST_PAUSE = 3600.0
_SHARE = 20  # times as long as a sweep took, the next one waits at least
_NEVER = float("inf")
# Slots that may come before a sweep is due: half as many as were in use after the last
# one, so that the pool stays well under twice what is alive. And not fewer than these.
_LEAST_NEW = 4096


class Sweeper:
    """Sweeps a store: at some events, and the more rarely the less it finds.

    Args:
        store: whose slots.
        grants: of that store.
    """

    def __init__(self, store: LocalStore, grants: Grants) -> None:
        self._store, self._grants = store, grants
        self._pause = _AFTER_NEW_PAGES
        self._room = _LEAST_NEW  # for new slots until the next sweep
        self.due = _NEVER  # by time.monotonic
        self._took = 0.0  # seconds, the last sweep
        self.reclaimed = 0
        self.held_back = ""  # why no slot could be freed the last time

    def client_left(self) -> None:
        """Look soon: its slots may be nobody's now."""
        pause = max(_AFTER_A_CLIENT, _SHARE * self._took)
        self.due = min(self.due, time.monotonic() + pause)

    def pages_came(self, count: int) -> None:
        """Look in a while, or at once if many came since the last time."""
        if not count:
            return
        self._pause = _AFTER_NEW_PAGES
        self.due = min(self.due, time.monotonic() + self._pause)
        self._room -= count
        if self._room < 0:
            self.run(again=True)

    def run(self, *, again: bool) -> None:
        """Free what no living grant keeps.

        Args:
            again: look again after a pause; else only when something happens.
        """
        freed, self.held_back = 0, ""
        began = time.monotonic()
        try:
            freed = self._grants.sweep()
        except (OSError, MemoryError) as error:
            self.held_back = f"cannot find what is free: {error or 'no memory'}"
        self._took = time.monotonic() - began
        self.reclaimed += freed
        if freed:
            self._pause = _AFTER_NEW_PAGES
            libc.trim()  # what taking pages in, and looking, took
        self.due = time.monotonic() + self._pause if again else _NEVER
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._room = max(_LEAST_NEW, self._store.usage()["slots"] // 2)
