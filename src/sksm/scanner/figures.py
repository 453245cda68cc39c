"""What a scanner holds, brought and cost: one object an epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from typing import TYPE_CHECKING

import numpy as np
import psutil

from sksm.process import status
from sksm.spans import PAGE_SIZE

if TYPE_CHECKING:
    from sksm.scanner.scanner import Epoch, Scanner
    from sksm.scanner.watched import Watched

_MAPPING_BYTES = 256  # of kernel memory, about: slabinfo, vm_area_struct


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
    cpu_seconds: float  # ours and the daemons', since the beginning
    looking_seconds: float  # of processor time, for this epoch as such
    read_bytes: int  # in this epoch
    watched_bytes: int
    merged_bytes: int  # that would be pages of their own
    unmerged_pages: int
    pool_bytes: int
    own_bytes: int  # memory of ours and of the daemons
    saved_net_bytes: int  # merged, less pool, ourselves and mappings; may be negative
    stops: int
    stopped_p99_seconds: float
    stopped_max_seconds: float
    processes: list[ProcessFigures]
    refused: list[Refusal]


class Ledger:
    """Adds up what a scanner brought and cost, since it began."""

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._began = time.monotonic()
        self._before: dict[int, float] = {}  # processor time of daemons when first met

    def cpu_seconds(self) -> float:
        """Say how much processor time was used, by us and by the daemons."""
        return time.process_time() + sum(self._used(pid) for pid in self._keepers())

    def _used(self, pid: int) -> float:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            used = times.user + times.system
            return used - self._before.setdefault(pid, used)
        return 0.0

    def _keepers(self) -> set[int]:
        found = [group.keeper for group in self._scanner.groups.values()]
        return {pid for pid in found if pid is not None and pid != os.getpid()}

    def figures(self, epoch: Epoch) -> Figures:
        """Sum up how things stand after an epoch."""
        members = [
            one
            for group in self._scanner.groups.values()
            for one in group.members.values()
        ]
        processes = [_of_process(one) for one in members]
        merged = sum(one.merged_bytes for one in processes)
        mappings = sum(one.mappings_added for one in processes) * _MAPPING_BYTES
        pool = sum(group.pool_bytes for group in self._scanner.groups.values())
        own = _own_bytes(os.getpid()) + sum(map(_own_bytes, self._keepers()))
        stops = [seconds for one in members for seconds in one.outcome.stops]
        return Figures(
            epoch=epoch.number,
            seconds=time.monotonic() - self._began,
            pause_seconds=self._scanner.pause,
            cpu_seconds=self.cpu_seconds(),
            looking_seconds=epoch.looking_seconds,
            read_bytes=epoch.read_pages * PAGE_SIZE,
            watched_bytes=sum(one.watched_bytes for one in processes),
            merged_bytes=merged,
            unmerged_pages=sum(one.unmerged_pages for one in processes),
            pool_bytes=pool,
            own_bytes=own,
            saved_net_bytes=merged - pool - own - mappings,
            stops=len(stops),
            stopped_p99_seconds=float(np.quantile(stops, 0.99)) if stops else 0.0,
            stopped_max_seconds=max(stops, default=0.0),
            processes=processes,
            refused=[
                Refusal(one.pid, one.name, one.refusal or str(one.error))
                for one in self._scanner.refused.values()
            ],
        )


def _of_process(one: Watched) -> ProcessFigures:
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
        merged_bytes=one.pages.merged() * PAGE_SIZE,
        unmerged_pages=one.unmerged,
        mappings_added=one.outcome.report.mappings_added,
    )


def _own_bytes(pid: int) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        memory = psutil.Process(pid).memory_info()
        return int(memory.rss - memory.shared)
    return 0
