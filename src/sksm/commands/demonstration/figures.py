"""What the kernel says of memory, before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sksm.commands import sharing
from sksm.daemon.protocol import Status
from sksm.process import status
from sksm.spans import PAGE_SIZE
from sksm.store.pool import POOL_NAME


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """Memory in use, in bytes.

    The first four add up to `total_bytes`, which is what the demo is about. The
    machine's figures hold whatever else runs here, too.
    """

    workers_pss_bytes: int  # each page divided by the number of its users
    pool_unmapped_bytes: int  # pool pages that no worker maps, so none counts
    daemon_pss_bytes: int  # sksmd's own, its index included
    mappings_bytes: int  # kernel memory of the workers' mappings of the pool
    workers_rss_bytes: int
    pool_bytes: int
    machine_available_bytes: int  # MemAvailable
    machine_cpu_lists_bytes: int  # free too: it goes there first, and is not counted
    machine_used_bytes: int  # AnonPages + Shmem + PageTables + SUnreclaim

    @property
    def total_bytes(self) -> int:
        """All that the workers and sksm take."""
        return (
            self.workers_pss_bytes
            + self.pool_unmapped_bytes
            + self.daemon_pss_bytes
            + self.mappings_bytes
        )


def take(workers: Sequence[int], daemon: Status | None) -> Snapshot:
    """Read everything now.

    Args:
        workers: process ids.
        daemon: its status, if it runs.
    """
    rollups = [status.sizes(f"/proc/{pid}/smaps_rollup") for pid in workers]
    machine = status.sizes("/proc/meminfo")
    pool = daemon.pool_bytes if daemon else 0
    mapped = sum(map(_pool_pss, workers)) if pool else 0
    own = status.sizes(f"/proc/{daemon.pid}/smaps_rollup") if daemon else {}
    used = ("AnonPages", "Shmem", "PageTables", "SUnreclaim")
    return Snapshot(
        workers_pss_bytes=sum(rollup["Pss"] for rollup in rollups),
        pool_unmapped_bytes=max(0, pool - mapped),
        daemon_pss_bytes=own.get("Pss", 0),
        mappings_bytes=sharing.mapping_bytes(workers),
        workers_rss_bytes=sum(rollup["Rss"] for rollup in rollups),
        pool_bytes=pool,
        machine_available_bytes=machine["MemAvailable"],
        machine_cpu_lists_bytes=_cpu_lists(),
        machine_used_bytes=sum(machine[name] for name in used),
    )


def _pool_pss(pid: int) -> int:
    """Sum a process's part of the pool's pages: of those alone.

    Its other shared memory does not count, nor do its copies of pool pages.
    """
    parts = {"Pss:": 1, "Anonymous:": -1}
    total, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            inside = f"/memfd:{POOL_NAME}" in rest
        elif inside and name in parts:
            total += parts[name] * int(rest.split()[0]) * 1024
    return total


def _cpu_lists() -> int:
    """Sum the free pages that each processor keeps for itself (/proc/zoneinfo).

    The kernel lets these lists grow to an eighth of memory (since 6.7) and gives
    them back within seconds; MemAvailable leaves them out.
    """
    words = (line.split() for line in Path("/proc/zoneinfo").read_text().splitlines())
    return PAGE_SIZE * sum(int(word[1]) for word in words if word[:1] == ["count:"])
