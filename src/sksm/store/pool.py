"""The pool: a sparse memfd whose page i is slot i.

Slots are filled by `pwrite`, which reports a lack of memory as ENOSPC or ENOMEM,
where storing through a mapping would be SIGBUS. A slot is written before anybody
learns of it, and given back by punching a hole (fallocate(2)).
"""

from __future__ import annotations

import fcntl
import os
import resource

import numpy as np
import numpy.typing as npt

from sksm.linux import libc, memfd
from sksm.spans import PAGE_SIZE
from sksm.store.alone import APART

POOL_NAME = "sksm-pool"
_GROWTH = 1 << 30  # of the file's size, which is sparse and costs nothing
_F_ADD_SEALS, _F_SEAL_SHRINK = 1033, 2  # linux/fcntl.h
_PUNCH = 0x1 | 0x2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


class Pool:
    """Page frames that private mappings share.

    Args:
        name: what /proc/PID/maps shows for them, behind "memfd:".
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.fd = memfd.create(name)
        # SIGBUS threatens whoever maps a file that shrinks. Read-only, for those
        # who get a descriptor and open it again through /proc/self/fd.
        fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_SHRINK)
        os.fchmod(self.fd, 0o444)
        self.slots = 0  # one more than the highest slot ever given out
        self._size = 0
        self._free = np.zeros(0, np.int64)  # ascending

    def close(self) -> None:
        """Let go of the file; the kernel frees it with its last mapping."""
        os.close(self.fd)

    def reader(self) -> int:
        """Open the file again, read-only, for somebody else. The caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def nbytes(self) -> int:
        """Memory the pool occupies, in bytes."""
        return os.fstat(self.fd).st_blocks * 512

    def filled_from(self, slot: int) -> int:
        """Give the first slot at or after `slot` that holds no page."""
        at = int(np.searchsorted(self._free, slot))
        return int(self._free[at]) if at < len(self._free) else self.slots

    def put(self, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Write pages into free slots, neighbours into neighbours if possible.

        Returns:
            Their slots, shape (rows,).

        Raises:
            OSError: ENOSPC, ENOMEM, EFBIG when there is no memory left; then no
                slot was used.
        """
        slots = self._choose(len(rows))
        self._grow(int(slots[-1]) + 1)
        at = 0
        try:
            for part in _straight(slots):
                _write_all(self.fd, rows[at : at + len(part)], int(part[0]) * PAGE_SIZE)
                at += len(part)
        except OSError:
            self._punch(slots)  # some were written
            raise
        self._free = self._free[~np.isin(self._free, slots, assume_unique=True)]
        self.slots = max(self.slots, int(slots[-1]) + 1)
        return slots

    def put_alone(self, row: npt.NDArray[np.uint8], slot: int) -> None:
        """Write a page into a slot that stands alone; errors as `put`."""
        self._grow(slot + APART)  # behind the end of the file is SIGBUS
        try:
            _write_all(self.fd, row, slot * PAGE_SIZE)
        except OSError:
            self.free_alone(slot)
            raise

    def free_alone(self, slot: int) -> None:
        """Give back a slot that stands alone, with what somebody read behind it."""
        libc.fallocate(self.fd, _PUNCH, slot * PAGE_SIZE, APART * PAGE_SIZE)

    def free(self, slots: npt.NDArray[np.int64]) -> None:
        """Give slots back that nobody maps, ascending."""
        self._punch(slots)
        self._free = np.union1d(self._free, slots)

    def _punch(self, slots: npt.NDArray[np.int64]) -> None:
        for part in _straight(slots):
            where = (int(part[0]) * PAGE_SIZE, len(part) * PAGE_SIZE)
            libc.fallocate(self.fd, _PUNCH, *where)

    def _choose(self, count: int) -> npt.NDArray[np.int64]:
        """Pick a straight run of free slots; scattered ones if many are free."""
        if len(self._free) >= count:
            breaks = np.flatnonzero(np.diff(self._free) != 1) + 1
            starts = np.concatenate(([0], breaks))
            lengths = np.diff(np.concatenate((starts, [len(self._free)])))
            fitting = np.flatnonzero(lengths >= count)
            if len(fitting):
                first = starts[fitting[0]]
                return self._free[first : first + count].copy()
            if len(self._free) > self.slots // 4:
                return self._free[:count].copy()
        return np.arange(self.slots, self.slots + count)

    def _grow(self, slots: int) -> None:
        needed = slots * PAGE_SIZE
        if needed > self._size:
            size = -(-needed // _GROWTH) * _GROWTH
            limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
            if needed <= limit:  # none of -1, which is no limit
                size = min(size, limit)
            os.ftruncate(self.fd, size)
            self._size = size


def _write_all(fd: int, rows: npt.NDArray[np.uint8], offset: int) -> None:
    left = np.ascontiguousarray(rows).data.cast("B")
    while left:
        done = os.pwrite(fd, left, offset)
        left, offset = left[done:], offset + done


def _straight(slots: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Cut ascending slots into runs without a gap."""
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    return np.split(slots, breaks) if len(slots) else []
