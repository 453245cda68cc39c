"""Files below /proc/PID, opened once: each then speaks of one program only."""

from __future__ import annotations

import os


class ProcFiles:
    """The open files of a process's directory in /proc.

    They stay with the memory that the process had when they were opened: if it
    executes another program, they are empty.
    """

    def __init__(self, pid: int | str) -> None:
        self._pid = pid
        self._open: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        """Give a descriptor for reading, opened the first time."""
        if name not in self._open:
            path = f"/proc/{self._pid}/{name}"
            self._open[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[name]

    def close(self) -> None:
        """Close all of them."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
