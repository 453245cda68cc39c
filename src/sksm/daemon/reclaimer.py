"""When and how the daemon gives slots back that nobody maps."""

from __future__ import annotations

import contextlib
import os
import time

import numpy as np
import numpy.typing as npt
import psutil

from sksm.linux import libc
from sksm.store.local import LocalStore
from sksm.store.reclaim import take_census

_AFTER_A_CLIENT = 2.0  # seconds from the end of a client to looking for its slots
_AFTER_NEW_PAGES = 30.0  # and half as often each time that nothing was found
_LONGEST_PAUSE = 3600.0
_NEVER = float("inf")


class Reclaimer:
    """Looks for dead slots of a store, the more rarely the less it finds.

    Args:
        store: whose slots.
        born: when the store was made, as `psutil.Process.create_time` tells time.
    """

    def __init__(self, store: LocalStore, born: float) -> None:
        self._store = store
        self._born = born
        self._older: set[int] = set()  # clients that were there before the store
        self._pause = _AFTER_NEW_PAGES
        self.due = _NEVER  # by time.monotonic
        self.reclaimed = 0
        self.held_back = ""  # why nothing could be given back the last time

    def client_came(self, pid: int) -> None:
        """Remember a process that may map the pool from now on.

        Of those that began after the pool, anybody may have got hold of it.
        """
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).create_time() < self._born:
                self._older.add(pid)

    def client_left(self) -> None:
        """Look soon: its slots may be nobody's now."""
        self.due = min(self.due, time.monotonic() + _AFTER_A_CLIENT)

    def pages_came(self) -> None:
        """Look in a while: new pages may be un-merged by then."""
        self._pause = _AFTER_NEW_PAGES
        self.due = min(self.due, time.monotonic() + self._pause)

    def run(self, *, again: bool) -> None:
        """Give back the slots that two walks in a row find unmapped.

        Two, because a mapping that moves while its process is looked at can be
        missed by one. Nothing is given back while a client holds a lease.

        Args:
            again: look again after a pause; else only when something happens.
        """
        self.due = time.monotonic() + self._pause if again else _NEVER
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self.held_back = ""
        used = self._store.used()
        if not len(used):
            return
        with self._store.exclusive() as holder:
            if holder is not None:
                self.held_back = f"process {holder} is in the middle of a merge"
                self.due = time.monotonic() + 1.0
                return
            try:
                dead = self._twice_unseen(used)
                libc.trim()  # what taking pages in, and looking, took
            except (OSError, MemoryError) as error:
                self.held_back = f"cannot look at every process: {error}"
                return
            self._drop(dead)

    def _drop(self, dead: npt.NDArray[np.int64]) -> None:
        self._store.drop(dead)
        self.reclaimed += len(dead)
        if len(dead):
            self._pause = _AFTER_NEW_PAGES

    def _twice_unseen(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Look twice which slots are mapped; give the others, or none."""
        for _ in range(2):
            census = take_census(
                os.fstat(self._store.pool),
                self._store.slots,
                since=self._born,
                clients=self._older,
            )
            if census.unreadable:
                pids = ", ".join(map(str, census.unreadable[:5]))
                self.held_back = f"may not look at the mappings of process {pids}"
                return slots[:0]
            slots = census.unmapped(slots)
        return slots
