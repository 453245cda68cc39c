"""What /proc/PID/status tells of a process: proc(5). Everybody may read it."""

from __future__ import annotations

from pathlib import Path

from sksm.spans import PAGE_SIZE


def read(pid: int) -> dict[str, str]:
    """Give each field as text.

    Raises:
        OSError: ENOENT, ESRCH if there is no such process (any more).
    """
    text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    fields = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in fields}


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
