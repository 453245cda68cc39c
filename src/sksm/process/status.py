"""What files below /proc tell of a process: proc(5)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from sksm.spans import PAGE_SIZE

_DELETED = " (deleted)"  # what the kernel adds to a path that is gone
_FLAGS = 6  # of the fields behind the name: number 9 of all
_PF_EXITING = 0x4  # linux/sched.h
_PF_KTHREAD = 0x200000
_START = 19  # as _FLAGS: number 22 of all


class Glance(NamedTuple):
    """What one look at a process tells."""

    name: str  # up to 15 bytes
    parent: int
    runs_programs: bool  # neither a thread of the kernel nor a zombie
    start: int  # in ticks since the machine came up; with the pid it is one process


def contents(pid: int, name: str, most: int = 1 << 16) -> bytes:
    """Give the first bytes of a file in /proc/PID, by one read.

    Raises:
        OSError: ENOENT, ESRCH if there is no such process (any more).
        PermissionError: we may not read it.
    """
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, most)
    finally:
        os.close(fd)


def glance(pid: int) -> Glance:
    """Say who a process is, in less time than anything else here takes.

    Raises:
        OSError: as `contents`.
    """
    text = contents(pid, "stat", 1024)
    end = text.rindex(b")")
    fields = text[end + 2 :].split(b" ", _START + 1)
    thread = int(fields[_FLAGS]) & _PF_KTHREAD
    runs = not thread and fields[0] not in (b"Z", b"X")
    name = os.fsdecode(text[text.index(b"(") + 1 : end])
    return Glance(name, int(fields[1]), runs, int(fields[_START]))


def arguments(pid: int) -> list[str]:
    """Give the command line of a process; it may have written another one.

    Raises:
        OSError: as `contents`.
    """
    return os.fsdecode(contents(pid, "cmdline")).rstrip("\0").split("\0")


def cgroups(pid: int) -> list[str]:
    """List the control groups of a process, one path a hierarchy (cgroups(7)).

    Raises:
        OSError: as `contents`.
    """
    lines = os.fsdecode(contents(pid, "cgroup")).rstrip("\n").split("\n")
    return [line.split(":", 2)[2].removesuffix(_DELETED) for line in lines]


def program(pid: int) -> str:
    """Give the path of the file that a process executes.

    Raises:
        OSError: as `contents`.
    """
    return os.readlink(f"/proc/{pid}/exe").removesuffix(_DELETED)


def uid(pid: int) -> int:
    """Say with whose rights a process acts: its effective user id.

    Raises:
        OSError: as `contents`.
    """
    _, _, rest = contents(pid, "status").partition(b"\nUid:")
    return int(rest.split(None, 2)[1])


def read(pid: int) -> dict[str, str]:
    """Give each field of /proc/PID/status as text. Everybody may read it.

    Raises:
        OSError: ENOENT, ESRCH if there is no such process (any more).
    """
    text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    fields = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in fields}


def stat(pid: int, tid: int | None = None) -> list[str]:
    """Give the fields of /proc/PID/stat behind the name, the state first.

    Args:
        pid: the process.
        tid: which thread of it, if not all of them together.

    Raises:
        OSError: as `read`.
    """
    task = "" if tid is None else f"/task/{tid}"
    text = Path(f"/proc/{pid}{task}/stat").read_text(errors="replace")
    return text[text.rindex(")") + 2 :].split()


def ends(pid: int) -> bool:
    """Say whether a process is on its way out, or gone: it does nothing more.

    Raises:
        PermissionError: a /proc that hides other users' processes (hidepid).
    """
    try:
        return bool(int(stat(pid)[_FLAGS]) & _PF_EXITING)
    except (FileNotFoundError, ProcessLookupError):
        return True


def sizes(path: str) -> dict[str, int]:
    """Read the "Name: 123 kB" lines of a file in /proc, as bytes."""
    found = {}
    for line in Path(path).read_text().splitlines():
        name, _, rest = line.partition(":")
        with contextlib.suppress(ValueError, IndexError):
            found[name] = int(rest.split()[0]) * 1024
    return found


def name(pid: int) -> str:
    """Name a process, by up to 15 characters; "?" if there is none (any more)."""
    try:
        return read(pid)["Name"]
    except OSError:
        return "?"


def private_pages(pid: int) -> int:
    """Say how many anonymous pages a process has in memory, about.

    Raises:
        OSError: as `read`.
    """
    kib = read(pid).get("RssAnon", "0 kB").split()[0]
    return int(kib) * 1024 // PAGE_SIZE


def resident_pages(pid: int) -> int:
    """Say how many pages a process has mapped that are in memory.

    By /proc/PID/statm (proc(5)).

    Raises:
        OSError: as `read`.
    """
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def own_bytes(pid: int) -> int:
    """Read the memory of a process that is no file's and not shared.

    By /proc/PID/statm (proc(5)), in bytes; 0 if it ended.
    """
    with contextlib.suppress(OSError):
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
        return (int(resident) - int(shared)) * PAGE_SIZE
    return 0


def pss(pid: int) -> int:
    """Read the memory a process accounts for, its share of shared pages included.

    `Pss` of /proc/PID/smaps_rollup, in bytes; 0 if it ended.
    """
    with contextlib.suppress(OSError):
        return sizes(f"/proc/{pid}/smaps_rollup").get("Pss", 0)
    return 0
