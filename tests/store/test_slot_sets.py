"""Sets of slots as runs do what Python's sets do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksm.store import slot_sets
from sksm.store.alone import APART

pytestmark = [pytest.mark.check, pytest.mark.pure]

SLOTS = st.sets(st.one_of(st.integers(0, 40), st.sampled_from([APART, 3 * APART])))


def as_runs(slots):
    return slot_sets.of_slots(np.array(sorted(slots), np.int64))


def as_set(runs):
    return set(slot_sets.slots_of(runs).tolist())


def assert_normal(runs):
    """They ascend, and neither touch nor overlap."""
    assert (runs[:, 0] < runs[:, 1]).all()
    assert (runs[1:, 0] > runs[:-1, 1]).all()


@given(st.lists(st.one_of(SLOTS, SLOTS), max_size=5))
def test_a_union_is_a_union(sets):
    """Of any number of them."""
    runs = slot_sets.union(map(as_runs, sets))
    assert_normal(runs)
    assert as_set(runs) == set().union(*sets)
    assert slot_sets.count(runs) == len(set().union(*sets))


@given(SLOTS, SLOTS)
def test_a_difference_is_a_difference(some, others):
    """Whichever is empty."""
    runs = slot_sets.difference(as_runs(some), as_runs(others))
    assert_normal(runs)
    assert as_set(runs) == some - others


def test_what_is_no_slot_is_left_out():
    """Slots may come in any order, more than once, and be none at all."""
    given_ = np.array([7, -1, 5, 7, -2, 6], np.int64)
    assert slot_sets.of_slots(given_).tolist() == [[5, 8]]
    assert slot_sets.of_slots(given_[:0]).tolist() == []
