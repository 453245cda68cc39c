"""How much of a process is merged at once: little, until it has proved to last."""

from __future__ import annotations

_FIRST_PAGES, _FIRST_SHARE = 1024, 0.01  # of all its pages: so much may be for nothing
_GROWTH = 4  # times as much, each time that what was merged has lasted
_LASTS = 0.75  # of it


class Trial:
    """What a process may still have merged into a pool, in pages.

    A page that is written to after it was merged is there twice, until the pool's is
    given back. A program that writes to all of its memory now and then would for a
    while take half as much again. So what is merged first is little; when it lasts,
    more is, and when it does not, little again.

    Args:
        seconds: for how long what was merged is watched.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._most = 0.0  # in one trial
        self._merged = 0  # in this one
        self._unmerged = 0  # by writes when it began
        self._ends_at: float | None = None

    def room(self, seen: int, unmerged: int, now: float) -> int:
        """Say how many pages may be merged now.

        Args:
            seen: pages that there are.
            unmerged: how many were written to after they had been merged, so far.
            now: what time it is, in seconds.
        """
        first = max(_FIRST_PAGES, _FIRST_SHARE * seen)
        self._most = max(self._most, first)
        if self._ends_at is not None and now >= self._ends_at:
            lost = unmerged - self._unmerged
            lasts = lost <= (1 - _LASTS) * self._merged
            self._most = self._most * _GROWTH if lasts else first
            self._ends_at = None
        if self._ends_at is None:
            self._merged, self._unmerged = 0, unmerged
        return max(0, int(self._most) - self._merged)

    def merged(self, pages: int, now: float) -> None:
        """Note that pages were merged. When the first of a trial was, it begins."""
        self._merged += pages
        if self._ends_at is None and pages:
            self._ends_at = now + self.seconds

    @property
    def ends_at(self) -> float | None:
        """When it will be known whether they last; None: nothing was merged."""
        return self._ends_at
