"""Who maps which pool, and what that saves: read from the kernel, now."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import psutil

from sksm import pages
from sksm.linux import ksm, maps, pagemap
from sksm.linux.maps import Mapping
from sksm.process import status
from sksm.spans import PAGE_SIZE, Span
from sksm.store.pool import POOL_NAME

PoolKey = tuple[str, int]  # device and inode, as maps shows them
_VMA_ESTIMATE = 200  # bytes of a struct vm_area_struct, where slabinfo is closed


@dataclasses.dataclass(slots=True)
class Sharer:
    """A process that maps pages of a pool."""

    pid: int
    name: str
    mapped_bytes: int = 0
    shared_bytes: int = 0  # of those, not copied by a write since
    mappings: int = 0
    pss_bytes: int = 0  # of all of its memory, its part of what it shares included
    page_table_bytes: int = 0  # of all of its memory; a merge adds none


@dataclasses.dataclass(slots=True)
class PoolUse:
    """A pool: who maps it, and who owns it."""

    inode: int
    sharers: list[Sharer]
    pool_bytes: int = 0
    exact: bool = True  # else, at least so much: its file is out of reach
    daemon_pid: int | None = None  # None: it outlived its daemon
    daemon_bytes: int = 0  # the daemon's own memory, index and page tables included

    @property
    def shared_bytes(self) -> int:
        """Pages that processes would otherwise hold as their own."""
        return sum(sharer.shared_bytes for sharer in self.sharers)

    @property
    def mappings(self) -> int:
        """How many mappings the sharing takes."""
        return sum(sharer.mappings for sharer in self.sharers)


@dataclasses.dataclass(slots=True)
class KsmSharer:
    """A process in which KSM has merged pages (/proc/PID/ksm_stat)."""

    pid: int
    name: str
    merged_bytes: int  # zeros included
    profit_bytes: int  # less the kernel's memory for it; the frames are not counted
    pss_bytes: int


@dataclasses.dataclass(slots=True)
class Survey:
    """All pools that could be seen, and what KSM shares."""

    pools: list[PoolUse]
    ksm_sharers: list[KsmSharer]
    ksm_saved_bytes: int
    unreadable_processes: int  # belong to others, and may share too
    vma_bytes: int  # of kernel memory for one mapping
    vma_measured: bool

    @property
    def shared_bytes(self) -> int:
        """Pages that processes would otherwise hold as their own."""
        return sum(pool.shared_bytes for pool in self.pools)

    @property
    def mapping_bytes(self) -> int:
        """Kernel memory for the mappings."""
        return self.vma_bytes * sum(pool.mappings for pool in self.pools)

    @property
    def saved_bytes(self) -> int:
        """What all this saves, less all it costs. May be negative."""
        own = sum(pool.pool_bytes + pool.daemon_bytes for pool in self.pools)
        by_pools = self.shared_bytes - own - self.mapping_bytes
        return by_pools + self.ksm_saved_bytes


def survey(daemon: int | None) -> Survey:
    """Look at every process that may be looked at.

    Args:
        daemon: this user's daemon, if one runs.
    """
    found: dict[PoolKey, dict[int, list[Mapping]]] = defaultdict(dict)
    owners = _owners(daemon)
    for key, owner in owners.items():
        if owner == daemon:
            found[key] = {}  # also where nobody maps it
    unreadable = 0
    by_ksm: list[KsmSharer] = []
    for pid in psutil.pids():
        try:
            _collect(found, pid)
            by_ksm += _ksm_sharer(pid)
        except PermissionError:
            unreadable += 1
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile, and shares nothing any more
    pools = [_pool_use(key, mappers, owners) for key, mappers in found.items()]
    cost, measured = vma_cost()
    return Survey(pools, by_ksm, _ksm_saved(by_ksm), unreadable, cost, measured)


def _ksm_sharer(pid: int) -> list[KsmSharer]:
    try:
        found = ksm.stat(pid)
    except FileNotFoundError:  # it ended, or the kernel has no KSM
        return []
    if not (merged := ksm.merged_in(found) * PAGE_SIZE):
        return []
    profit = found.get("ksm_process_profit", merged)
    return [KsmSharer(pid, status.name(pid), merged, profit, status.pss(pid))]


def _ksm_saved(sharers: list[KsmSharer]) -> int:
    """Say what KSM saves, net, by the kernel's word.

    Its sum for the machine counts pages of processes that have ended since ksmd last
    ran, and those of the processes count the frames that remain: neither may be more.
    """
    whole = ksm.figures().get("general_profit", 0)
    return min(whole, sum(sharer.profit_bytes for sharer in sharers))


def _collect(found: dict[PoolKey, dict[int, list[Mapping]]], pid: int) -> None:
    for mapping in maps.every_mapping(pid):
        if pages.is_pool(mapping):
            key = (mapping.device, mapping.inode)
            found[key].setdefault(pid, []).append(mapping)


def _pool_use(
    key: PoolKey, mappers: dict[int, list[Mapping]], owners: dict[PoolKey, int]
) -> PoolUse:
    live: set[tuple[int, int]] = set()
    use = PoolUse(key[1], [], daemon_pid=owners.get(key))
    for pid, mappings in mappers.items():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            use.sharers.append(_sharer(pid, mappings))
            live |= {(m.offset, m.span.size) for m in mappings}
    use.sharers.sort(key=lambda sharer: -sharer.shared_bytes)
    holders = [*([use.daemon_pid] if use.daemon_pid else []), *mappers]
    sizes = (_pool_bytes(pid, key) for pid in holders)
    size = next((size for size in sizes if size is not None), None)
    use.exact = size is not None
    use.pool_bytes = _union(live) if size is None else size
    if use.daemon_pid:
        use.daemon_bytes = status.own_bytes(use.daemon_pid) + _tables(use.daemon_pid)
    return use


def _sharer(pid: int, mappings: list[Mapping]) -> Sharer:
    name = "?"
    with contextlib.suppress(psutil.Error):
        name = psutil.Process(pid).name()
    sharer = Sharer(pid, name, mappings=len(mappings), pss_bytes=status.pss(pid))
    sharer.page_table_bytes = _tables(pid)
    table = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for mapping in mappings:
            copied = copied_bytes(table, mapping.span)
            sharer.mapped_bytes += mapping.span.size
            sharer.shared_bytes += mapping.span.size - copied
    finally:
        os.close(table)
    return sharer


def _tables(pid: int) -> int:
    with contextlib.suppress(OSError):
        return status.sizes(f"/proc/{pid}/status").get("VmPTE", 0)
    return 0


def copied_bytes(table: int, span: Span) -> int:
    """Count the bytes of a pool mapping that a write made private.

    Args:
        table: an open /proc/PID/pagemap.
        span: the mapping, in that process.
    """
    return len(pagemap.copied(table, [span])) * PAGE_SIZE


def _owners(daemon: int | None) -> dict[PoolKey, int]:
    """Find the daemon of each pool: the one process that can write to it."""
    owners = {}
    for pid in _daemons() | ({daemon} if daemon else set()):
        for file, writable in _pool_files(pid):
            if writable:
                owners[maps.file_key(file)] = pid
    return owners


def _daemons() -> set[int]:
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(
                word.endswith(("sksm.daemon", "sksmd")) for word in process.cmdline()
            ):
                found.add(process.pid)
    return found


def _pool_bytes(pid: int, key: PoolKey) -> int | None:
    """Ask the file itself, through a descriptor that `pid` has."""
    for file, _ in _pool_files(pid):
        if maps.file_key(file) == key:
            return file.st_blocks * 512
    return None


def _pool_files(pid: int) -> list[tuple[os.stat_result, bool]]:
    """List the pools a process has open, and whether it may write to them."""
    found = []
    folder = Path(f"/proc/{pid}/fd")
    with contextlib.suppress(OSError):
        for entry in list(folder.iterdir()):
            with contextlib.suppress(OSError):
                if os.readlink(entry).startswith(f"/memfd:{POOL_NAME}"):
                    writable = bool(entry.lstat().st_mode & 0o200)
                    found.append((entry.stat(), writable))
    return found


def _union(pieces: set[tuple[int, int]]) -> int:
    """Measure what pieces (offset, size) of a file cover together."""
    covered = stop = 0
    for start, size in sorted(pieces):
        covered += max(0, start + size - max(start, stop))
        stop = max(stop, start + size)
    return covered


def mapping_bytes(pids: Iterable[int]) -> int:
    """Say what kernel memory the mappings of pools take that these processes have."""
    mappings = (mapping for pid in pids for mapping in maps.every_mapping(pid))
    return sum(map(pages.is_pool, mappings)) * vma_cost()[0]


def vma_cost() -> tuple[int, bool]:
    """Read what the kernel allocates for a mapping; only root may, others estimate."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/slabinfo").read_text().splitlines():
            if line.startswith("vm_area_struct"):
                return int(line.split()[3]), True
    return _VMA_ESTIMATE, False
