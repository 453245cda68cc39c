"""Letting a process keep no more of a pool than it still shows.

A grant keeps all of its slots while one of them is mapped, also those whose pages all
sharers have copied by a write since. So what a process shows is mapped once more, under
a grant of its own; and its copies, which lie in mappings of the old one, are moved to
anonymous memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sksm.linux import pagemap
from sksm.linux.maps import Mapping
from sksm.pages import shows
from sksm.process import DONE, EXCHANGE_PAGES, Exchange, pages_of, spans_of
from sksm.process.other import EVERYTHING, OtherProcess
from sksm.spans import PAGE_SIZE, groups
from sksm.store import Store

_LEAST = 256  # pages: a MiB
_WORTH = 0.1  # of the pages that a process maps


def is_worth_it(copied: int, mapped: int) -> bool:
    """Say whether to regrant a process, by how many pages it maps, and has copied."""
    return copied >= max(_LEAST, _WORTH * mapped)


def regrant(space: OtherProcess, store: Store) -> int:
    """Map what a process shows of a store's pool under a new grant, if worth it.

    Args:
        space: the process. Nobody else may watch its memory meanwhile.
        store: whose pool.

    Returns:
        How many pages were mapped that it had copied, and are mapped no more.

    Raises:
        OSError: as `OtherProcess.privatise` and `exchange`. What was not done is as it
            was, and keeps the old grant.
    """
    mappings = [m for m in space.mappings(EVERYTHING) if shows(m, store.name)]
    if not mappings:
        return 0
    spans = [mapping.span for mapping in mappings]
    numbers = pages_of(spans)
    own = np.intersect1d(numbers, pagemap.copied(space.pagemap(), spans))
    if not is_worth_it(len(own), len(numbers)):
        return 0
    runs = len(spans_of(own))
    if space.may_add_mappings(2 * runs) < 2 * runs:
        return 0
    store.let_go()
    with store.granted():
        for mapping in mappings:
            _regrant(space, store, mapping, own)
    return len(own)


def _regrant(
    space: OtherProcess, store: Store, mapping: Mapping, own: npt.NDArray[np.int64]
) -> None:
    numbers = pages_of([mapping.span])
    copied = np.isin(numbers, own)
    not_forked = "dc" in mapping.flags
    for span in spans_of(numbers[copied]):
        for (piece,) in groups([span], EXCHANGE_PAGES):
            space.privatise(piece, mapping.prot, not_forked=not_forked)
    for span in spans_of(numbers[~copied]):
        for (piece,) in groups([span], EXCHANGE_PAGES):
            behind = piece.start - mapping.span.start
            slot = (mapping.offset + behind) // PAGE_SIZE
            if not store.claim(slot, piece.pages):
                continue  # it shows a slot that is no longer in use: leave it
            item = Exchange(
                piece,
                mapping.prot,
                slot,
                anonymous=mapping.anonymous,
                not_forked=not_forked,
            )
            with space.protected(piece):
                (verdict,) = space.exchange(store.pool, [item])
            if verdict == DONE:
                store.mapped(slot, piece.pages)
            else:
                store.in_doubt()
