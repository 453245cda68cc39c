"""Sharing by the kernel itself, in the call: MADV_MERGE, where a kernel has it."""

from __future__ import annotations

from sksm.engines import frames
from sksm.engines.frames import Offered
from sksm.linux import libc
from sksm.pages import PageBatch
from sksm.process import AddressSpace
from sksm.report import MergeReport


class KernelEngine:
    """Offers pages by MADV_MERGE. One for all processes merged with each other.

    What became of pages is read from their frames, as root: nobody else is told.
    """

    name = "kernel"
    in_place = True
    pool = None

    def __init__(self) -> None:
        self._offered: list[Offered] = []

    def share(self, space: AddressSpace, batch: PageBatch) -> MergeReport:
        """Merge each page of `batch` with its twin, if the kernel knows one.

        If not, it is merged when its twin is offered. So pages are counted in the end.
        """
        report = MergeReport()
        self._offered.append(frames.advise(space, batch, libc.MADV_MERGE, report))
        return report

    def finish(self) -> dict[int, MergeReport]:
        """Tell what became of all that was offered."""
        offered, self._offered = self._offered, []
        return frames.outcomes(offered)
