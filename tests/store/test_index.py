"""The index against a dictionary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksm.store import UNSEEN
from sksm.store.index import Index

pytestmark = [pytest.mark.check, pytest.mark.pure]

# Prints that meet in the table: all low bits alike, or a few different ones.
PRINTS = st.builds(
    lambda high, low: high << 40 | low, st.integers(0, 40), st.integers(0, 3)
)
STEPS = st.lists(st.tuples(st.sampled_from("+-"), st.sets(PRINTS, max_size=12)))


def array(items, dtype=np.uint64):
    return np.array(list(items), dtype)


@given(STEPS)
def test_index_answers_as_a_dictionary_would(steps):
    """Through inserts and removals, with slots given out anew after removal."""
    index, twin, free = Index(), {}, list(range(1000, 0, -1))
    for sign, prints in steps:
        if sign == "+":
            new = [name for name in prints if name not in twin]
            slots = [free.pop() for _ in new]
            index.insert(array(new), array(slots, np.int64))
            twin.update(zip(new, slots, strict=True))
        else:
            gone = [twin.pop(name) for name in prints if name in twin]
            index.remove(array(gone, np.int64))
            free += gone
        asked = [high << 40 | low for high in range(41) for low in range(4)]
        found = index.lookup(array(asked)).tolist()
        assert found == [twin.get(name, UNSEEN) for name in asked]
        assert len(index) == len(twin)
        assert index.used().tolist() == sorted(twin.values())


def test_a_print_may_be_asked_for_many_times_at_once():
    """Duplicates in a question get the same answer each."""
    index = Index()
    index.insert(array([7, 9]), array([3, 1], np.int64))
    assert index.lookup(array([9, 7, 8, 7, 9])).tolist() == [1, 3, UNSEEN, 3, 1]


def test_empty_index_and_empty_questions_are_answered():
    """Nothing is not a special case."""
    index = Index()
    index.insert(array([]), array([], np.int64))
    index.remove(array([], np.int64))
    assert len(index) == 0
    assert index.lookup(array([])).tolist() == []
    assert index.lookup(array([0, 2**64 - 1])).tolist() == [UNSEEN, UNSEEN]


def test_prints_at_both_ends_of_their_range_are_ordinary():
    """No print is reserved to mean "empty"."""
    index = Index()
    index.insert(array([0, 2**64 - 1]), array([0, 1], np.int64))
    assert index.lookup(array([2**64 - 1, 0])).tolist() == [1, 0]


def test_a_million_pages_cost_at_most_24_bytes_each():
    """Growth in batches loses nothing, and memory stays within the budget."""
    index, pages = Index(), 1_000_000
    prints = np.random.default_rng(1).permutation(pages).astype(np.uint64)
    prints *= np.uint64(0x9E3779B97F4A7C15)  # odd: still all different
    for first in range(0, pages, 4096):
        batch = prints[first : first + 4096]
        index.insert(batch, np.arange(first, first + len(batch)))
        assert index.nbytes <= max(24 * len(index), 1 << 17)
    assert len(index) == pages
    assert (index.lookup(prints) == np.arange(pages)).all()
