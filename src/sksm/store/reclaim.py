"""Which slots somebody still maps: asked of the kernel, not of counters.

A slot is live while a private mapping of the pool covers it in some process and
its page there was not copied by a write. An absent page table entry is live: the
next read brings the slot. What no process maps any more can be given back.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from sksm.linux import maps, pagemap
from sksm.linux.pagemap import Category
from sksm.spans import PAGE_SIZE, Span
from sksm.store.alone import stands_alone


@dataclasses.dataclass(slots=True)
class Census:
    """What a walk over all processes found."""

    live: npt.NDArray[np.bool_]  # by slot
    alone: set[int]  # slots that are live and stand alone
    mappers: dict[int, int]  # process -> bytes of the pool it maps
    unreadable: list[int]  # processes that may map the pool, and do not say

    def unmapped(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Give those of some slots, ascending, that are not live."""
        far = stands_alone(slots)
        near, lone = slots[~far], slots[far]
        seen = np.array(sorted(self.alone), np.int64)
        return np.concatenate([near[~self.live[near]], lone[~np.isin(lone, seen)]])


def take_census(
    pool: os.stat_result, slots: int, *, since: float, clients: Collection[int]
) -> Census:
    """Look at every process of the domain for mappings of the pool.

    Processes are listed until no new one appears: one that forks while it is
    looked at may leave its mappings to a child and exit.

    Args:
        pool: `fstat` of the pool's file.
        slots: how many slots there are.
        clients: processes older than the pool that asked for it.
        since: when the pool was made, in seconds since the epoch. A process that
            may not be looked at but is older, and not among `clients`, cannot
            have got hold of the pool.
    """
    census = Census(np.zeros(slots, bool), set(), {}, [])
    done: set[tuple[int, float]] = set()
    while new := _processes() - done:
        for pid, born in new:
            _look_at(census, pool, pid, born < since and pid not in clients)
        done |= new
    return census


def _processes() -> set[tuple[int, float]]:
    found = set()
    for pid in psutil.pids():
        try:
            found.add((pid, psutil.Process(pid).create_time()))
        except psutil.NoSuchProcess:
            continue
    return found - {pair for pair in found if pair[0] == os.getpid()}


def _look_at(census: Census, pool: os.stat_result, pid: int, harmless: bool) -> None:
    try:
        text = Path(f"/proc/{pid}/maps").read_bytes()
        if len(shown := maps.showing(text, pool)):
            _mark(census, pid, shown)
            census.mappers[pid] = int((shown[:, 1] - shown[:, 0]).sum())
    except (FileNotFoundError, ProcessLookupError):
        return  # it ended: whatever it mapped is gone with it
    except PermissionError:
        if not harmless and _in_domain(pid):
            census.unreadable.append(pid)


def _in_domain(pid: int) -> bool:
    """Say whether a process runs as our uid, or could have done so before.

    Only root can turn into somebody else and keep its memory, and root may look
    at every process.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (OSError, ValueError):
        return False
    uids = next(line.split()[1:] for line in lines if line.startswith("Uid:"))
    return str(os.getuid()) in uids


def _mark(census: Census, pid: int, shown: npt.NDArray[np.int64]) -> None:
    """Mark the slots that mappings of the pool, ascending, show: `maps.showing`."""
    firsts, stops, offsets = shown.T // PAGE_SIZE
    numbers = pagemap.spread(firsts, stops - firsts)
    slots = pagemap.spread(offsets, stops - firsts)
    table = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        private = copied(table, [Span(*bounds) for bounds in shown[:, :2].tolist()])
    finally:
        os.close(table)
    mapped = slots[~np.isin(numbers, private)]
    census.live[mapped[mapped < len(census.live)]] = True
    census.alone |= set(mapped[stands_alone(mapped)].tolist())


def copied(table: int, spans: Sequence[Span]) -> npt.NDArray[np.int64]:
    """Number the pages that hold private copies where mappings show the pool.

    A swap entry counts only if it is not write-protected: the marker that
    userfaultfd leaves in an absent entry looks like one, and means nothing.

    Args:
        table: an open /proc/PID/pagemap.
        spans: the mappings in that process, ascending. Pages between them may be
            among the numbers.
    """
    told = Category.PRESENT | Category.SWAPPED | Category.FILE | Category.WRITTEN
    swapped = Category.SWAPPED | Category.WRITTEN
    runs = pagemap.walked(table, spans, told)
    kinds = runs["categories"]
    private = kinds & np.uint64(Category.PRESENT) != 0
    private |= kinds & np.uint64(swapped) == np.uint64(swapped)
    private &= kinds & np.uint64(Category.FILE) == 0
    return pagemap.numbers_of(runs[private])
