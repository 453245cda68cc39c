"""How much processor time a scanner may take, and when it looks again."""

from __future__ import annotations

from collections.abc import Callable

_WINDOW_SECONDS = 600.0  # over which the share is an average
SHORTEST, LONGEST = 1.0, 5.0  # seconds from one epoch to the next
_SLOWER = 1.5  # times as long, after an epoch that brought nothing
_FOR_LOOKING = 0.5  # of the share, at most, for epochs as such


class Budget:
    """A share of one processor, and pauses that fit it.

    What is not used is saved up, for ten minutes at most, so that there is enough
    for what just came up: a new guest is merged at once, and paid for later.

    Args:
        share: of one processor, 0 to 1.
        used: says how much processor time was used so far, in seconds.
        clock: says what time it is, in seconds.
    """

    def __init__(
        self, share: float, used: Callable[[], float], clock: Callable[[], float]
    ) -> None:
        self.share = share
        self._used, self._clock = used, clock
        self._saved = self._most
        self._looked_at = self._now()
        self._pause = SHORTEST

    @property
    def _most(self) -> float:
        return self.share * _WINDOW_SECONDS

    def give(self, share: float) -> None:
        """Have another share from now on. What was saved or is owed stays."""
        self.left()
        self.share = share

    def _now(self) -> tuple[float, float]:
        return self._clock(), self._used()

    def left(self) -> float:
        """Say how many seconds of processor time there are to spend, or owed."""
        time, used = self._now()
        time_before, used_before = self._looked_at
        self._looked_at = time, used
        earned = (time - time_before) * self.share
        self._saved = min(self._most, self._saved + earned - (used - used_before))
        return self._saved

    def pause(self, *, news: bool, cost: float) -> float:
        """Say how long to wait for the next epoch, in seconds.

        Also in debt it is looked again, since that shows what came to rest.

        Args:
            news: this one brought something to do.
            cost: processor time of looking, without what was done about it.
        """
        self._pause = SHORTEST if news else min(LONGEST, self._pause * _SLOWER)
        return max(self._pause, cost / (self.share * _FOR_LOOKING))
