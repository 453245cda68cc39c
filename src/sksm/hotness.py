"""Which pages are written to, found by reading them again and again.

Nothing is changed in the process, which has its price: a value that is written and
written back between two looks (a reference count, say) is not seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from sksm.errors import ProcessGone
from sksm.estimate import Estimate
from sksm.holding import Holding, entries_of, fingerprints_of
from sksm.linux import pagemap
from sksm.process import AddressSpace, permission, spans_of
from sksm.twins import Flags

MOST_LOOKS = 10


class Watch:
    """Looks at the pages of an estimate and remembers which of them changed.

    Args:
        estimate: of these processes. One that ends is removed from it.
        spaces: whose memory.
    """

    def __init__(self, estimate: Estimate, spaces: Sequence[AddressSpace]) -> None:
        self._estimate = estimate
        self._spaces = [one for one in spaces if one.pid in estimate.holdings]
        self.hot: dict[int, Flags] = {
            pid: np.zeros(len(holding.numbers), bool)
            for pid, holding in estimate.holdings.items()
        }
        self.looks = 0

    def look(self) -> None:
        """Read every page once more; what is not as it was is hot, or no more there."""
        for space in list(self._spaces):
            holding = self._estimate.holdings[space.pid]
            try:
                changed = _changed(space, holding, self._estimate.seed)
                permission.require_memory(space.pid)  # of an ended one nothing is there
                self.hot[space.pid] |= changed
            except (ProcessLookupError, ProcessGone):
                self._estimate.remove(space.pid)
                self._spaces.remove(space)
                del self.hot[space.pid]
        self.looks += 1

    def cold(self) -> Estimate:
        """Give the estimate that counts no hot page as equal to another."""
        return self._estimate.apart(self.hot)


def keep_looking(
    watches: Sequence[Watch], seconds: float, tell: Callable[[float], None]
) -> None:
    """Look several times within `seconds`, at least once, at the end.

    Takes half of one core at most, as it pauses for as long as a look took.

    Args:
        watches: what to look at.
        seconds: how long.
        tell: hears after each look how many seconds more are over.
    """
    started = time.monotonic()
    pause = seconds / MOST_LOOKS
    while (left := started + seconds - time.monotonic()) > 0:
        time.sleep(min(pause, left))
        before = time.process_time()
        for watch in watches:
            watch.look()
        pause = max(pause, time.process_time() - before)
        tell(left - (started + seconds - time.monotonic()))


def _changed(space: AddressSpace, holding: Holding, seed: int) -> Flags:
    changed = np.ones(len(holding.numbers), bool)
    # To read pages that were dropped would bring zeros in their place.
    entries = entries_of(space.pagemap(), holding.numbers)
    here = np.flatnonzero(entries & np.uint64(pagemap.ENTRY_PRESENT))
    at = 0
    for spans, prints in fingerprints_of(space, spans_of(holding.numbers[here]), seed):
        read = here[at : at + sum(span.pages for span in spans)]
        if prints is not None:
            changed[read] = prints != holding.prints[read]
        at += len(read)
    return changed
