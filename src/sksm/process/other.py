"""The memory of another process."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from sksm.linux import maps
from sksm.process import guards
from sksm.process.allowance import Allowance
from sksm.process.reading import read_unpinned
from sksm.spans import PAGE_SIZE, Span

EVERYTHING = Span(0, 1 << 56)  # as far as five levels of page tables reach


class OtherProcess:
    """Another process's address space; see `AddressSpace`.

    Looking and reading leave the process alone. It is an ordinary outcome that
    it ends meanwhile: then everything raises `ProcessLookupError`.

    Raises:
        OSError: EACCES or EPERM without leave to trace it (ptrace(2)); ESRCH or
            ENOENT if there is no such process.
    """

    pinned = False

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._allowance = Allowance(pid)
        self._tables: dict[str, int] = {}
        self._rows: npt.NDArray[np.uint8] | None = None

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._tables.values():
            os.close(fd)
        self._tables.clear()

    def objection(self) -> str | None:
        """Say why nothing of this process may be merged."""
        return guards.objection(self.pid)

    def mappings(self, span: Span = EVERYTHING) -> list[maps.Mapping]:
        """List the mappings that meet `span`, ascending, with flags.

        Its text costs the kernel a walk of the page tables, 28 ms a GiB.
        """
        return maps.mappings(self.pid, span)

    def count_mappings(self, span: Span = EVERYTHING) -> int:
        """Count the mappings that meet `span`."""
        if span == EVERYTHING:
            return maps.count(self.pid)
        return maps.count_within(self._table("maps"), span)

    def may_add_mappings(self, wanted: int) -> int:
        """Grant up to `wanted` more mappings, to a quarter of the limit."""
        return self._allowance.grant(wanted)

    def pagemap(self) -> int:
        """Give an open /proc/PID/pagemap."""
        return self._table("pagemap")

    def _table(self, name: str) -> int:
        if name not in self._tables:
            path = f"/proc/{self.pid}/{name}"
            self._tables[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._tables[name]

    def read(self, spans: Iterable[Span]) -> npt.NDArray[np.uint8]:
        """Copy whole pages out, one row a page; valid until the next time."""
        pieces = list(spans)
        pages = sum(piece.pages for piece in pieces)
        if self._rows is None or pages > len(self._rows):
            self._rows = np.empty((pages, PAGE_SIZE), np.uint8)
        return read_unpinned(self._table("mem"), pieces, self._rows)
