"""What engines that merge in place share: an advice, and the truth page by page.

An advice that succeeds says nothing of what was merged. The frames do.
"""

from __future__ import annotations

import dataclasses
import errno
import os

import numpy as np
import numpy.typing as npt

from sksm.linux import pageflags, pagemap
from sksm.pages import PageBatch
from sksm.process import BUSY, DONE, AddressSpace, pages_of, spans_of
from sksm.report import MergeReport

Flags = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, slots=True)
class Sharing:
    """What the kernel shows in the place of pages: three arrays of shape (pages,)."""

    frames: npt.NDArray[np.uint64]  # 0 where there is none
    shared: Flags  # a frame of KSM's, which others show or may come to show
    zero: Flags  # the kernel's page of zeros


class Frames:
    """The frames that a set of processes shares by KSM, as far as they were seen."""

    def __init__(self) -> None:
        self._kept: set[int] = set()

    def advise(
        self, space: AddressSpace, batch: PageBatch, advice: int, report: MergeReport
    ) -> npt.NDArray[np.int64]:
        """Give an advice for pages; gives the numbers of those that may now merge.

        What was merged before is counted as such, and what the kernel refused.
        """
        numbers = pages_of(batch.spans)
        before = shared_pages(space, numbers)
        self._kept.update(before.frames[before.shared].tolist())
        left = ~(before.shared | before.zero)
        report.add(already=len(left) - left.sum())
        verdicts = np.repeat(
            space.advise(batch.spans, advice), [span.pages for span in batch.spans]
        )
        for verdict in np.unique(verdicts[left & (verdicts != DONE)]).tolist():
            report.refuse(_refusal(verdict), int((left & (verdicts == verdict)).sum()))
        possible: npt.NDArray[np.int64] = numbers[left & (verdicts == DONE)]
        return possible

    def tally(
        self,
        space: AddressSpace,
        numbers: npt.NDArray[np.int64],
        report: MergeReport,
    ) -> int:
        """Count what is merged now of pages that were not; gives how many are not.

        Of those in one frame, the first is counted as the frame's own.
        """
        now = shared_pages(space, numbers)
        frames = set(now.frames[now.shared].tolist())
        fresh = len(frames - self._kept)
        self._kept |= frames
        shared, zero = int(now.shared.sum()), int(now.zero.sum())
        report.add(zero=zero, stored=fresh, merged=shared - fresh)
        return len(numbers) - shared - zero


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


def _refusal(verdict: int) -> str:
    if verdict == errno.EBUSY:
        return BUSY
    return f"the kernel refused it: {os.strerror(verdict)}"
