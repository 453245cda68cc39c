"""From slots to mappings: the fast arithmetic against a slow, obvious twin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksm.engines.plan import SHORT_GAP, Run, own_gaps, runs
from sksm.process import EXCHANGE_PAGES
from sksm.store import UNSEEN, ZERO

pytestmark = [pytest.mark.check, pytest.mark.pure]


@st.composite
def batches(draw):
    """Page numbers and slots of a batch, made of pieces as they occur."""
    numbers, slots = [], []
    page, slot = EXCHANGE_PAGES - draw(st.integers(-3, 60)), 100
    for _ in range(draw(st.integers(0, 8))):
        page += draw(st.sampled_from([0, 0, 0, 1, 3]))
        kind = draw(st.sampled_from(["on", "on", "jump", "unseen", "unseen", "zero"]))
        if kind == "jump":
            slot += draw(st.integers(-30, 30))
        for _ in range(draw(st.integers(1, SHORT_GAP + 2))):
            numbers.append(page)
            slots.append({"unseen": UNSEEN, "zero": ZERO}.get(kind, slot))
            page, slot = page + 1, slot + 1
    return np.array(numbers, np.int64), np.array(slots, np.int64)


def slow_own_gaps(numbers, slots):
    own = [False] * len(slots)
    for at in range(len(slots)):
        left = right = at
        while left >= 0 and slots[left] == UNSEEN:
            left -= 1
        while right < len(slots) and slots[right] == UNSEEN:
            right += 1
        if left < 0 or right == len(slots) or left == right:
            continue
        straight = all(
            numbers[i] - numbers[left] == i - left for i in range(left, right + 1)
        )
        same_line = slots[right] - slots[left] == right - left
        seen = slots[left] >= 0 and slots[right] >= 0
        own[at] = bool(
            straight and same_line and seen and right - left - 1 <= SHORT_GAP
        )
    return own


def slow_runs(numbers, slots, own):
    """Walk page by page: (pages, slot of the first, pages that stay)."""
    found = []
    for at in range(len(slots)):
        if slots[at] == UNSEEN and not own[at]:
            continue
        goes_on = (
            found
            and found[-1][-1] == at - 1
            and numbers[at] == numbers[at - 1] + 1
            and numbers[at] % EXCHANGE_PAGES
        )
        seen = [i for i in found[-1] if not own[i]] if goes_on else []
        if own[at] or not seen:
            fits = bool(goes_on)
        elif slots[at] == ZERO:
            fits = slots[seen[0]] == ZERO
        else:
            fits = slots[seen[0]] >= 0 and slots[at] - slots[seen[0]] == at - seen[0]
        if fits:
            found[-1].append(at)
        else:
            found.append([at])
    trimmed = []
    for pages in found:
        seen = [i for i in pages if not own[i]]
        if seen:
            slot = None if slots[seen[0]] == ZERO else int(slots[seen[0]])
            kept = [i for i in range(seen[0], seen[-1]) if own[i]]
            trimmed.append((seen[0], seen[-1] + 1, slot, kept))
    return trimmed


@given(batches())
def test_gaps_are_those_of_the_obvious_rule(batch):
    """A gap is bridged if short, unseen throughout, and on one straight line."""
    assert own_gaps(*batch).tolist() == slow_own_gaps(*batch)


@given(batches())
def test_runs_are_those_of_a_walk_page_by_page(batch):
    """Every page that is to be shared is in one run, at the slot it has.

    Runs are cut at multiples of what one exchange takes, and begin and end with
    a page that is shared.
    """
    numbers, slots = batch
    own = own_gaps(numbers, slots)
    found = [
        (run.first, run.stop, run.slot, [i for a, b in run.own for i in range(a, b)])
        for run in runs(numbers, slots, own)
    ]
    assert found == slow_runs(numbers, slots, own)


@given(batches())
def test_runs_count_the_pages_they_share(batch):
    """All pages that have a slot are shared, and no others."""
    numbers, slots = batch
    shared = sum(run.shared for run in runs(numbers, slots, own_gaps(numbers, slots)))
    assert shared == (slots != UNSEEN).sum()


def test_a_gap_that_is_too_long_is_gone_around():
    """Just short enough is covered; one page more makes two mappings."""
    for gap, mappings in ((SHORT_GAP, 1), (SHORT_GAP + 1, 2)):
        numbers = np.arange(gap + 2)
        slots = np.full(gap + 2, UNSEEN)
        slots[[0, -1]] = 10, 10 + gap + 1
        assert len(runs(numbers, slots, own_gaps(numbers, slots))) == mappings


def test_neighbouring_own_pages_are_one_pair():
    """What stays is told as few ranges, in indices of the batch."""
    slots = np.array([UNSEEN, 10, UNSEEN, UNSEEN, 13, UNSEEN, 15])
    numbers = np.arange(7)
    assert runs(numbers, slots, own_gaps(numbers, slots)) == [
        Run(1, 7, 10, ((2, 4), (5, 6)))
    ]


def test_nothing_makes_no_runs():
    """An empty batch is no special case for the caller."""
    none = np.empty(0, np.int64)
    assert runs(none, none, own_gaps(none, none)) == []
