"""Files below /proc/PID, opened once: each then speaks of one program only."""

from __future__ import annotations

import errno
import os
from typing import Literal

from sksm.process import status


class ProcFiles:
    """The open files of a process's directory in /proc.

    They stay with the memory that the process had when they were opened: if it
    executes another program, they are empty.
    """

    def __init__(self, pid: int | Literal["self"]) -> None:
        self._pid = pid
        self._open: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        """Give a descriptor for reading, opened the first time.

        Raises:
            ProcessLookupError: the process has ended, or is about to.
            OSError: from open(2), EACCES for a process we may not look into.
        """
        if name not in self._open:
            try:
                self._open[name] = os.open(
                    f"/proc/{self._pid}/{name}", os.O_RDONLY | os.O_CLOEXEC
                )
            except PermissionError:
                # The files of a process that gave its memory back are root's: an
                # ordinary user is not told ESRCH, as the owner of others is.
                if self._pid != "self" and status.ends(self._pid):
                    raise ProcessLookupError(
                        errno.ESRCH, os.strerror(errno.ESRCH), str(self._pid)
                    ) from None
                raise
        return self._open[name]

    def close(self) -> None:
        """Close all of them."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
