"""What engines that merge in place share: an advice, and the truth page by page.

An advice that succeeds says nothing of what was merged. The frames do.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sksm.linux import pageflags, pagemap
from sksm.pages import PageBatch
from sksm.process import BUSY, DONE, AddressSpace, pages_of, spans_of
from sksm.report import MergeReport
from sksm.spans import PAGE_SIZE, Span

Flags = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, slots=True)
class Sharing:
    """What the kernel shows in the place of pages: three arrays of shape (pages,)."""

    frames: npt.NDArray[np.uint64]  # 0 where there is none
    shared: Flags  # a frame of KSM's, which others show or may come to show
    zero: Flags  # the kernel's page of zeros

    @property
    def merged(self) -> Flags:
        """Which pages take no frame of their own: those that are one of both."""
        found: Flags = self.shared | self.zero
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class Offered:
    """Pages of a process that the kernel may merge now, numbers ascending."""

    space: AddressSpace
    numbers: npt.NDArray[np.int64]


def advise(
    space: AddressSpace, batch: PageBatch, advice: int, report: MergeReport
) -> Offered:
    """Give an advice for pages; gives those that may now merge.

    What was merged before is counted as such, and what the kernel refused.
    """
    numbers = pages_of(batch.spans)
    before = shared_pages(space, numbers)
    left = ~before.merged
    report.add(already=len(left) - left.sum())
    verdicts = np.repeat(
        space.advise(batch.spans, advice), [span.pages for span in batch.spans]
    )
    for verdict in np.unique(verdicts[left & (verdicts != DONE)]).tolist():
        report.refuse(_refusal(verdict), int((left & (verdicts == verdict)).sum()))
    return Offered(space, numbers[left & (verdicts == DONE)])


def outcomes(offered: Sequence[Offered], obstacle: str = "") -> dict[int, MergeReport]:
    """Say what became of pages that were offered, by process.

    Args:
        offered: all that were offered to be merged with each other.
        obstacle: why those are not merged that could be; "": they have no twin.
    """
    reports: dict[int, MergeReport] = {}
    for one, (merged, rest) in zip(offered, _tally(offered), strict=True):
        report = reports.setdefault(one.space.pid, MergeReport())
        report += merged
        if obstacle:
            report.refuse(obstacle, rest)
        else:
            report.add(unique=rest)
    return reports


def _tally(offered: Sequence[Offered]) -> list[tuple[MergeReport, int]]:
    """Count what is merged of pages that were not; and how many still are not.

    Of the pages that came to share a frame, one is the frame's own, unless others
    than these share it: then it was there before.
    """
    now = [shared_pages(one.space, one.numbers) for one in offered]
    everything = [np.empty(0, np.uint64), *(one.frames[one.shared] for one in now)]
    frames, counts = np.unique(np.concatenate(everything), return_counts=True)
    ours = set(frames[pageflags.counts(frames) <= counts.astype(np.uint64)].tolist())
    told = []
    for found, mine in zip(now, everything[1:], strict=True):
        kept = ours & set(mine.tolist())
        ours -= kept
        report = MergeReport()
        report.add(
            zero=found.zero.sum(), stored=len(kept), merged=len(mine) - len(kept)
        )
        told.append((report, len(found.frames) - report.scanned))
    return told


def shared_pages(space: AddressSpace, numbers: npt.NDArray[np.int64]) -> Sharing:
    """Look at pages, numbers ascending.

    Raises:
        OSError: EACCES for all but root: frames are secret.
    """
    entries = [pagemap.entries(space.pagemap(), span) for span in spans_of(numbers)]
    table = np.concatenate(entries) if entries else np.empty(0, np.uint64)
    present = table & np.uint64(pagemap.ENTRY_PRESENT) != 0
    frames = np.where(present, table & np.uint64(pagemap.ENTRY_FRAME), np.uint64(0))
    flags = pageflags.of_frames(frames)
    return Sharing(
        frames,
        present & (flags & np.uint64(pageflags.KSM) != 0),
        present & (flags & np.uint64(pageflags.ZERO_PAGE) != 0),
    )


def merged_bytes(space: AddressSpace, span: Span) -> int:
    """Measure what KSM has merged of `span`; 0 for who may not know."""
    try:
        found = shared_pages(space, pages_of([span]))
    except PermissionError:
        return 0
    return int(found.merged.sum()) * PAGE_SIZE


def _refusal(verdict: int) -> str:
    if verdict == errno.EBUSY:
        return BUSY
    return f"the kernel refused it: {os.strerror(verdict)}"
