"""What there is in another process to build on: its vdso, its unused addresses."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

from sksm.linux import maps
from sksm.process import status, stub
from sksm.spans import HUGE_SIZE, PAGE_SIZE, Span

_AT_SYSINFO_EHDR = 33  # include/uapi/linux/auxvec.h


def vdso_and_hole(pid: int) -> tuple[Span, Span]:
    """Find the vdso's pages, and addresses far from where the kernel maps anything.

    Raises:
        OSError: ENOEXEC if there is no vdso; ESRCH in the middle of execve.
    """
    layout = Path(f"/proc/{pid}/maps").read_bytes()
    for line in layout.split(b"\n"):
        if line.endswith(b" [vdso]"):
            ((start, stop),) = maps.all_bounds(line).tolist()
            return Span(start, stop), _largest_hole(layout)
    if vdso_address(pid) or not _auxiliary_vector(pid):
        raise another_program()  # or in the middle of execve, or of its end
    raise OSError(errno.ENOEXEC, "it has no vdso")


def vdso_address(pid: int) -> int:
    """Read where the vdso of the program begins that runs just now; 0 if it ended."""
    return _auxiliary_vector(pid).get(_AT_SYSINFO_EHDR, 0)


def _auxiliary_vector(pid: int) -> dict[int, int]:
    """Read what the kernel told the program at its start (getauxval(3))."""
    try:
        data = Path(f"/proc/{pid}/auxv").read_bytes()
    except OSError:
        return {}
    return {key: word for key, word in struct.iter_unpack("<QQ", data) if key}


def another_program() -> ProcessLookupError:
    """Make the error that says that nothing is where it was."""
    return ProcessLookupError(errno.ESRCH, "it executes another program now")


def born(pid: int) -> int:
    """Read when a process began, in ticks; 0 if there is none (proc_pid_stat(5))."""
    try:
        return int(status.stat(pid)[19])
    except OSError:
        return 0


def lives(owner: stub.Owner) -> bool:
    """Say whether somebody else has a stub in use."""
    mine = owner.pid == os.getpid()
    return not mine and 0 < owner.born == born(owner.pid)  # 0: it was killed at once


def _largest_hole(layout: bytes) -> Span:
    """Find the middle of the most unused addresses in a text of /proc/PID/maps."""
    found = maps.all_bounds(layout)
    starts, stops = found[found[:, 1] < 1 << 47].T.tolist()
    starts, stops = [*starts, (1 << 47) - PAGE_SIZE], [1 << 30, *stops]
    size, start = max(
        (start - stop, stop) for stop, start in zip(stops, starts, strict=True)
    )
    middle = (start + size // 2) // HUGE_SIZE * HUGE_SIZE
    return Span(middle, middle + size // 4 // HUGE_SIZE * HUGE_SIZE)
