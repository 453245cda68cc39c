"""What files below /proc tell of a process: proc(5)."""

from __future__ import annotations

import contextlib
from pathlib import Path

from sksm.spans import PAGE_SIZE

_FLAGS = 6  # of the fields behind the name: number 9 of all
_PF_EXITING = 0x4  # linux/sched.h


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


def pss(pid: int) -> int:
    """Read the memory a process accounts for, its share of shared pages included.

    `Pss` of /proc/PID/smaps_rollup, in bytes; 0 if it ended.
    """
    with contextlib.suppress(OSError):
        return sizes(f"/proc/{pid}/smaps_rollup").get("Pss", 0)
    return 0
