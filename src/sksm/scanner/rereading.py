"""What was written to, found by reading: where the kernel cannot tell."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sksm.holding import fingerprints_of
from sksm.linux import pagemap
from sksm.linux.pagemap import PAGE_REGION, Category
from sksm.process import pages_of, spans_of
from sksm.process.other import OtherProcess
from sksm.spans import PAGE_SIZE, Span

_TOLD = Category.PRESENT | Category.FILE | Category.PFNZERO
_SEED = 0  # these fingerprints are compared with themselves only


class Rereading:
    """Does what `WriteWatch` does, before Linux 6.7 or without userfaultfd.

    Every page is read at every look, at some GiB a second, and 16 bytes are kept of
    it. What is written and written back between two looks is not seen.

    Args:
        pid: the process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._spans: dict[int, Span] = {}  # by where they begin
        self._numbers = np.empty(0, np.int64)
        self._prints = np.empty(0, np.uint64)

    def add(self, span: Span) -> bool:
        """Watch `span` from now on."""
        self._spans[span.start] = span
        return True

    def leave(self, span: Span) -> None:
        """Go on: reading stands in nobody's way."""

    def end(self) -> None:
        """Watch no longer."""
        self._spans.clear()

    def take_written(self, span: Span) -> npt.NDArray[np.void]:
        """List what changed since the last time: see `pagemap.take_written`."""
        with OtherProcess(self._pid) as space:
            runs = self._present(space, span)
            alone = runs[runs["categories"] == int(Category.PRESENT)]
            numbers, prints = self._read(space, pagemap.numbers_of(alone))
        changed = numbers[self._differ(numbers, prints)]
        inside = (self._numbers >= span.start // PAGE_SIZE) & (
            self._numbers < span.stop // PAGE_SIZE
        )
        kept, known = self._numbers[~inside], self._prints[~inside]
        order = np.argsort(np.concatenate([kept, numbers]), kind="stable")
        self._numbers = np.concatenate([kept, numbers])[order]
        self._prints = np.concatenate([known, prints])[order]
        shared = runs[runs["categories"] != int(Category.PRESENT)]
        return np.concatenate([shared, _regions(changed)])

    def _present(self, space: OtherProcess, span: Span) -> npt.NDArray[np.void]:
        """List what is there of what is watched, and of `span`."""
        parts = [one & span for one in self._spans.values()]
        rows = [
            (run.start, run.stop, int(kind & _TOLD))
            for part in parts
            if part.pages
            for run, kind in pagemap.walk(space.pagemap(), part, _TOLD)
            if kind & Category.PRESENT
        ]
        return np.array(sorted(set(rows)), PAGE_REGION)

    @staticmethod
    def _read(
        space: OtherProcess, numbers: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        found = [np.empty(0, np.int64)]
        names = [np.empty(0, np.uint64)]
        for spans, prints in fingerprints_of(space, spans_of(numbers), _SEED):
            if prints is not None:
                found.append(pages_of(spans))
                names.append(prints)
        return np.concatenate(found), np.concatenate(names)

    def _differ(
        self, numbers: npt.NDArray[np.int64], prints: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.bool_]:
        if not len(self._numbers):
            return np.ones(len(numbers), bool)
        at = np.minimum(np.searchsorted(self._numbers, numbers), len(self._numbers) - 1)
        same: npt.NDArray[np.bool_] = (self._numbers[at] == numbers) & (
            self._prints[at] == prints
        )
        return ~same


def _regions(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    rows = [
        (span.start, span.stop, int(Category.PRESENT)) for span in spans_of(numbers)
    ]
    return np.array(rows, PAGE_REGION)
