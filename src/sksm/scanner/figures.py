"""What a scanner holds, brought and cost: one object an epoch."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import time
from typing import TYPE_CHECKING

import numpy as np
import psutil

from sksm.errors import ProcessGone
from sksm.process import status
from sksm.spans import PAGE_SIZE

if TYPE_CHECKING:
    from sksm.scanner.scanner import Epoch, Scanner
    from sksm.scanner.watched import Watched

_MAPPING_BYTES = 256  # of kernel memory, about: slabinfo, vm_area_struct
_LAST_STOPS = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessFigures:
    """One watched process."""

    pid: int
    name: str
    memory_bytes: int  # its own and what it shows of a pool (RssAnon, RssShmem)
    watched_bytes: int
    duplicate_bytes: int  # that hold what another page holds, when last compared
    merged_bytes: int
    unmerged_pages: int  # by writes, since the beginning
    mappings_added: int


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """A process that is left alone."""

    pid: int
    name: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """All of them, and ourselves."""

    epoch: int
    seconds: float  # since the beginning
    pause_seconds: float  # until the next epoch
    cpu_seconds: float  # ours and the daemons', since the beginning, ended ones' too
    looking_seconds: float  # of processor time, for this epoch as such
    read_bytes: int  # in this epoch
    watched_bytes: int
    merged_bytes: int  # that would be pages of their own
    unmerged_pages: int  # since the beginning, by those that have ended, too
    pool_bytes: int
    own_bytes: int  # memory of ours and of the daemons
    saved_net_bytes: int  # merged, less pool, ourselves and mappings; may be negative
    stops: int  # since the beginning
    stopped_p99_seconds: float  # of the last 10,000 stops
    stopped_max_seconds: float
    stopped_seconds: list[float]  # each stop in this epoch
    processes: list[ProcessFigures]
    refused: list[Refusal]


class Ledger:
    """Adds up what a scanner brought and cost, since it began."""

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._began = time.monotonic()
        self._before: dict[int, float] = {}  # processor time of daemons when first met
        self._used: dict[int, float] = {}  # and since then
        self._members: list[Watched] = []  # when we last looked
        self._unmerged = 0  # pages, by processes that are watched no more
        self._stops = _Stops()

    def cpu_seconds(self) -> float:
        """Say how much processor time was used, by us, the daemons and ksmd for us."""
        for pid in self._keepers():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = psutil.Process(pid).cpu_times()
                used = times.user + times.system
                self._used[pid] = used - self._before.setdefault(pid, used)
        engines = sum(g.engine_seconds for g in self._scanner.groups.values())
        return time.process_time() + sum(self._used.values()) + engines

    def _keepers(self) -> set[int]:
        found = [group.keeper for group in self._scanner.groups.values()]
        return {pid for pid in found if pid is not None and pid != os.getpid()}

    def figures(self, epoch: Epoch) -> Figures:
        """Sum up how things stand after an epoch. Call it once for each."""
        stopped = self._follow_members()
        processes = [
            _of_process(one, group.merged_pages(one))
            for group in self._scanner.groups.values()
            for one in group.members.values()
        ]
        merged = sum(one.merged_bytes for one in processes)
        mappings = sum(one.mappings_added for one in processes) * _MAPPING_BYTES
        pool = sum(group.shared_bytes for group in self._scanner.groups.values())
        own = status.own_bytes(os.getpid()) + sum(
            map(status.own_bytes, self._keepers())
        )
        unmerged = self._unmerged + sum(one.unmerged_pages for one in processes)
        return Figures(
            epoch=epoch.number,
            seconds=time.monotonic() - self._began,
            pause_seconds=self._scanner.pause,
            cpu_seconds=self.cpu_seconds(),
            looking_seconds=epoch.looking_seconds,
            read_bytes=epoch.read_pages * PAGE_SIZE,
            watched_bytes=sum(one.watched_bytes for one in processes),
            merged_bytes=merged,
            unmerged_pages=unmerged,
            pool_bytes=pool,
            own_bytes=own,
            saved_net_bytes=merged - pool - own - mappings,
            stops=self._stops.count,
            stopped_p99_seconds=self._stops.p99_seconds(),
            stopped_max_seconds=self._stops.longest_seconds,
            stopped_seconds=stopped,
            processes=processes,
            refused=[
                Refusal(one.pid, one.name, one.refusal or str(one.error))
                for failed in (self._scanner.refused, self._scanner.postponed)
                for one in failed.values()
                if not isinstance(one.error, ProcessGone)
            ],
        )

    def _follow_members(self) -> list[float]:
        """See who is watched now; gives how long each stop took since the last time."""
        groups = self._scanner.groups.values()
        now = [one for group in groups for one in group.members.values()]
        gone = set(self._members).difference(now)
        self._members = now
        self._unmerged += sum(one.unmerged for one in gone)
        return [taken for one in (*gone, *now) for taken in self._stops.take(one)]


class _Stops:
    """What is kept of stops: not all, since there is no end of them."""

    def __init__(self) -> None:
        self.count = 0
        self.longest_seconds = 0.0
        self._last: collections.deque[float] = collections.deque(maxlen=_LAST_STOPS)

    def take(self, member: Watched) -> list[float]:
        """Take over the stops of a process; it forgets them."""
        taken = member.outcome.stops[:]
        member.outcome.stops.clear()
        self.count += len(taken)
        self.longest_seconds = max(self.longest_seconds, *taken, 0.0)
        self._last += taken
        return taken

    def p99_seconds(self) -> float:
        """Say how long 99 of 100 of the last ones took at most."""
        return float(np.quantile(self._last, 0.99)) if self._last else 0.0


def _of_process(one: Watched, merged_pages: int) -> ProcessFigures:
    memory = 0
    with contextlib.suppress(OSError):
        sizes = status.sizes(f"/proc/{one.pid}/status")
        memory = sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)
    return ProcessFigures(
        pid=one.pid,
        name=one.outcome.name,
        memory_bytes=memory,
        watched_bytes=one.pages.seen() * PAGE_SIZE,
        duplicate_bytes=one.twin_pages * PAGE_SIZE,
        merged_bytes=merged_pages * PAGE_SIZE,
        unmerged_pages=one.unmerged,
        mappings_added=one.outcome.report.mappings_added,
    )
