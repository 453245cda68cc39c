"""Sharing by the in-kernel KSM, steered.

Ranges in which duplicates were found are marked (MADV_MERGEABLE), all of a set of
processes first; then ksmd works until they are merged, and stops. Its other users
notice nothing but that it was at work. The marks stay, since taking one off
un-merges (Documentation/admin-guide/mm/ksm.rst).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path

from sksm.engines import frames
from sksm.engines.frames import Offered
from sksm.errors import NotPermitted, SksmError
from sksm.linux import ksm, libc
from sksm.pages import PageBatch
from sksm.process import AddressSpace
from sksm.report import MergeReport

UNFINISHED = "ksmd had not come to it in time"
# From one look to the next: looking takes processor time, too.
_SHORTEST_LOOK, _LONGEST_LOOK, _LOOK_SHARE = 0.002, 0.05, 0.05
_PATIENCE_SECONDS = 30.0  # for another command of ours that has ksmd
_LEAST_SECONDS, _SECONDS_A_PAGE = 10.0, 200e-6  # a tenth of the speed ksmd has
# ksmd merges a page in the second scan that finds it unchanged; one more, since the
# first may have begun before the page was marked.
_SCANS = 3
_IDLE_SCANS = 1  # without a page merged: there is nothing more to merge


class KsmEngine:
    """Shares pages by ksmd. One for all processes that are merged with each other.

    Args:
        state: where ksmd's knobs are written down while they are borrowed.
        seconds: how long ksmd may take; None for as long as it should.
        wanted: how many pages ought to be merged, if somebody knows. When so many are,
            ksmd need not look for more.
    """

    name = "ksm"
    in_place = True
    pool = None

    def __init__(
        self, state: Path, seconds: float | None = None, wanted: int | None = None
    ) -> None:
        self._state, self._seconds, self._wanted = state, seconds, wanted
        self._marked: list[Offered] = []

    def share(self, space: AddressSpace, batch: PageBatch) -> MergeReport:
        """Mark pages; those that ksmd has merged already are counted."""
        report = MergeReport()
        self._marked.append(frames.advise(space, batch, libc.MADV_MERGEABLE, report))
        return report

    def finish(self) -> dict[int, MergeReport]:
        """Let ksmd work until all that was marked is merged; tell what became of it.

        Raises:
            SksmError: ksmd cannot be had.
        """
        marked, self._marked = self._marked, []
        pages = sum(len(one.numbers) for one in marked)
        if not pages:
            return {}
        pids = {one.space.pid for one in marked}
        seconds = self._seconds or _LEAST_SECONDS + _SECONDS_A_PAGE * pages
        task = Task(pids, min(pages, self._wanted or pages))
        done = work(self._state, task, seconds)
        return frames.outcomes(marked, "" if done else UNFINISHED)


@dataclasses.dataclass(slots=True)
class Task:
    """What ksmd is to do, at one go or at several. All is marked that it is to merge.

    Attributes:
        pids: whose pages.
        pages: how many are to be merged. When there are fewer, it finds no more.
    """

    pids: set[int]
    pages: int
    _before: int = dataclasses.field(init=False)  # pages that were merged
    _most: int = dataclasses.field(init=False)
    _first: int = dataclasses.field(init=False)  # scan of all there is
    _last: int = dataclasses.field(init=False)  # in which a page was merged

    def __post_init__(self) -> None:
        self._before = self._most = self._merged()
        self._first = self._last = ksm.full_scans()

    def is_done(self) -> bool:
        """See how far ksmd has come. While it works, look often."""
        now, scans = self._merged(), ksm.full_scans()
        if now > self._most:
            self._most, self._last = now, scans
        found_no_more = scans - self._last >= _IDLE_SCANS
        over = scans - self._first >= _SCANS and found_no_more
        return over or now - self._before >= self.pages

    def _merged(self) -> int:
        total = 0
        for pid in self.pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended
                total += ksm.merged_pages(pid)
        return total


def work(state: Path, task: Task, seconds: float) -> bool:
    """Let ksmd work at a task.

    Args:
        state: where its knobs are written down while they are borrowed.
        task: what is to be done.
        seconds: how long it may take.

    Returns:
        Whether it came to the end.

    Raises:
        SksmError: it cannot be had; `NotPermitted`: by us.
    """
    try:
        with ksm.at_work(state, _PATIENCE_SECONDS):
            return _await(task, seconds)
    except PermissionError as error:
        raise NotPermitted(f"{ksm.obstacle() or error}: run this as root") from error
    except OSError as error:
        raise SksmError(f"ksmd: {error.strerror}") from error


def _await(task: Task, seconds: float) -> bool:
    started = time.monotonic()
    while (taken := time.monotonic() - started) < seconds:
        time.sleep(min(max(_SHORTEST_LOOK, taken * _LOOK_SHARE), _LONGEST_LOOK))
        if task.is_done():
            return True
    return False
