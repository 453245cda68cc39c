"""Which memory of a process may be worth merging, followed as it changes."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sksm.linux import ksm, maps
from sksm.process.other import EVERYTHING, OtherProcess
from sksm.spans import Span
from sksm.store.pool import POOL_NAME

_GUEST_BYTES = 64 << 20  # smaller mappings of an emulator are no guest's memory
Bounds = npt.NDArray[np.int64]  # begin and end of each, ascending: shape (n, 2)
# Private, may be read, and anonymous or the pool's: proc(5), /proc/PID/maps.
_FITTING = re.compile(
    rb"^[0-9a-f]{1,15}-[0-9a-f]{1,15} r..p [0-9a-f]+ [0-9a-f:]+ "
    rb"(?:0 *(?:\[heap\]|\[stack\]|\[anon.*)?|[0-9]+ +/memfd:%b.*)$"
    % POOL_NAME.encode(),
    re.MULTILINE,
)


_MOST_SKIPPED = 10  # readings, while the sizes are the same


class Layout:
    """The mappings of a process whose pages may be worth merging.

    Ten thousand lines are 10 ms for the kernel to write. They are read when the sizes
    in /proc/PID/statm changed, and now and then without that; and of them only those
    that are new are looked at.

    Args:
        pid: the process.
        guest: nothing outside of these counts; None: everything does.

    Raises:
        OSError: EACCES, EPERM without leave to look at it; ENOENT, ESRCH if gone.
    """

    def __init__(self, pid: int, guest: list[Span] | None = None) -> None:
        self._pid = pid
        self._table = maps.open_table(pid)
        self._size: list[str] = []
        self._skipped = 0
        self._guest = guest
        self._text = b""

    def close(self) -> None:
        """Follow no longer."""
        os.close(self._table)

    def news(self) -> Bounds | None:
        """List the mappings that are new since the last time, or have changed.

        None if nothing is new, nor gone.

        Raises:
            ProcessLookupError: it has ended, or runs another program.
        """
        size = _size(self._pid)
        if size == self._size and self._skipped < _MOST_SKIPPED:
            self._skipped += 1
            return None
        self._size, self._skipped = size, 0
        text = maps.text(self._table)
        if not text:
            gone = "it has ended, or runs another program"
            raise ProcessLookupError(errno.ESRCH, gone)
        if text == self._text:
            return None
        known = frozenset(self._text.split(b"\n"))
        new = b"\n".join(line for line in text.split(b"\n") if line not in known)
        self._text = text
        return self._fitting(new)

    def fitting(self, around: Span) -> Bounds:
        """List those that meet `around`, as they were the last time."""
        found = self._fitting(self._text)
        return found[(found[:, 0] < around.stop) & (found[:, 1] > around.start)]

    def all(self) -> Bounds:
        """List every mapping, those that do not count included."""
        return maps.all_bounds(self._text)

    def _fitting(self, text: bytes) -> Bounds:
        found = maps.all_bounds(b"\n".join(_FITTING.findall(text)))
        if self._guest is None:
            return found
        inside = np.zeros(len(found), bool)
        for part in self._guest:
            inside |= (found[:, 0] < part.stop) & (found[:, 1] > part.start)
        return found[inside]


def _size(pid: int) -> list[str]:
    """Give the size of all mappings, and of those for text and data: proc(5)."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return [fields[0], fields[3], fields[5]]


def joined(bounds: Bounds) -> list[Span]:
    """Join what lies side by side."""
    if not len(bounds):
        return []
    apart = bounds[1:, 0] != bounds[:-1, 1]
    starts = bounds[np.concatenate(([True], apart)), 0].tolist()
    stops = bounds[np.concatenate((apart, [True])), 1].tolist()
    return [Span(start, stop) for start, stop in zip(starts, stops, strict=True)]


def guest_memory(space: OtherProcess) -> list[Span]:
    """Find the memory of the machine that a process emulates.

    QEMU marks it for KSM, and nothing else. Where the kernel has no KSM, it is what
    is large.
    """
    found = [m for m in space.mappings(EVERYTHING) if m.anonymous]
    marked = [m.span for m in found if ksm.MARK in m.flags]
    return marked or [m.span for m in found if m.span.size >= _GUEST_BYTES]
