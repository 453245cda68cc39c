"""Which pages have twins: numpy against the obvious way, page by page."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sksm.store import UNSEEN
from sksm.twins import compare, pieces, stretches

pytestmark = [pytest.mark.check, pytest.mark.pure]

ZERO = 9

# Few contents, few frames: pages (content, frame, known).
CONTENTS = st.one_of(st.integers(1, 4), st.just(ZERO))
SETS = st.lists(st.tuples(CONTENTS, st.integers(0, 3)), max_size=30)


def slowly(held, known):
    """Say of each page what `Twins` does, in that order, by walking through frames."""
    in_frame = defaultdict(list)
    for index, (content, frame) in enumerate(held):
        in_frame[(content, frame) if frame else index].append(index)
    told = [[False] * 5 for _ in held]
    frames_of = defaultdict(list)  # content -> first pages of frames inside the set
    for key, users in in_frame.items():
        outside = isinstance(key, tuple) and len(users) == 1
        for index in users if outside else users[1:]:
            told[index][3:] = True, outside
        if not outside:
            frames_of[held[users[0]][0]].append(users[0])
    for content, owners in frames_of.items():
        if content == ZERO or len(owners) + (content in known) < 2:
            continue
        for index, (other, _) in enumerate(held):
            told[index][0] |= other == content
        for index in owners if content in known else owners[1:]:
            told[index][1] = True
        if content not in known:
            told[owners[0]][2] = True
    return told


@settings(deadline=None)
@given(SETS, st.sets(st.integers(1, 4)))
def test_twins_are_those_of_the_obvious_way(held, known):
    """Duplicates beyond one frame, whatever shares frames inside and outside."""
    prints = np.array([content for content, _ in held], np.uint64)
    frames = np.array([frame for _, frame in held], np.uint64)
    flags = np.array([content in known for content, _ in held], bool)
    found = compare(prints, frames, flags, ZERO)
    columns = found.twin, found.freed, found.kept, found.shares, found.outside
    assert [list(row) for row in zip(*columns, strict=True)] == slowly(held, known)


@settings(deadline=None)
@given(SETS)
def test_slots_are_given_in_the_order_of_first_pages(held):
    """One for each content with twins, as a pool would take them."""
    prints = np.array([content for content, _ in held], np.uint64)
    found = compare(
        prints, np.zeros(len(held), np.uint64), np.zeros(len(held), bool), ZERO
    )
    places = {}
    for (content, _), twin in zip(held, found.twin, strict=True):
        if twin:
            places.setdefault(content, len(places))
    expected = [places.get(content, UNSEEN) for content, _ in held]
    assert found.slots.tolist() == expected


PAGES = st.sets(st.integers(0, 60)).map(sorted)


@settings(deadline=None)
@given(PAGES, st.lists(st.integers(0, 60)).map(sorted), st.integers(0, 4), st.data())
def test_pieces_join_across_short_gaps_only(numbers, starts, gap, data):
    """Neighbours in one mapping; the page numbers in between all there."""
    wanted = data.draw(
        st.lists(st.booleans(), min_size=(n := len(numbers)), max_size=n)
    )
    stretch = stretches(np.array(numbers, np.int64), np.array(starts, np.int64))
    found = pieces(np.array(wanted, bool), stretch, gap).tolist()

    expected = []
    for index in (i for i in range(n) if wanted[i]):
        last = expected[-1][1] - 1 if expected else None
        if last is not None and joined(numbers, starts, last, index, gap):
            expected[-1][1] = index + 1
        else:
            expected.append([index, index + 1])
    assert found == expected


def joined(numbers, starts, left, right, gap):
    """Say whether two wanted pages, neighbours but for unwanted ones, are one piece."""
    between = itertools.pairwise(numbers[left : right + 1])
    return (
        right - left <= gap + 1
        and all(after - before == 1 for before, after in between)
        and not any(numbers[left] < start <= numbers[right] for start in starts)
    )
