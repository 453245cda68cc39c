"""Sharing by the kernel itself, in the call: MADV_MERGE, where a kernel has it."""

from __future__ import annotations

from sksm.engines import frames
from sksm.linux import libc
from sksm.pages import PageBatch
from sksm.process import AddressSpace
from sksm.report import MergeReport


class KernelEngine:
    """Offers pages by MADV_MERGE; what became of them is read from their frames.

    As root only: nobody else is told.
    """

    name = "kernel"
    in_place = True
    pool = None

    def share(self, space: AddressSpace, batch: PageBatch) -> MergeReport:
        """Merge each page of `batch` with its twin, if the kernel knows one."""
        report = MergeReport()
        offered = frames.advise(space, batch, libc.MADV_MERGE, report)
        ((merged, rest),) = frames.tally([offered])
        report += merged
        report.add(unique=rest)
        return report

    def finish(self) -> dict[int, MergeReport]:
        """Nothing is ever put off."""
        return {}
