"""Which pages a scanner finds worth merging."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksm.fingerprints import of_zeros
from sksm.scanner import candidates

pytestmark = [pytest.mark.check, pytest.mark.pure]

SEED = 7
ZERO = of_zeros(SEED)


def prints(values):
    return np.array(values, np.uint64)


def named(**processes):
    return {
        int(pid[1:]): (np.arange(len(values), dtype=np.int64) * 10, prints(values))
        for pid, values in processes.items()
    }


def test_pages_with_an_equal_one_anywhere_are_met():
    """In another process, in the same one, in the pool, or of zeros."""
    found = candidates.met(
        named(p1=[1, 2, 3, ZERO, 5], p2=[2, 6, 6, 9]), prints([5, 8]), SEED
    )
    assert found[1].tolist() == [False, True, False, True, True]
    assert found[2].tolist() == [True, True, True, False]


@given(
    st.lists(st.lists(st.integers(1, 12), max_size=8), min_size=1, max_size=4),
    st.sets(st.integers(1, 12)),
)
def test_what_is_met_is_what_counting_finds(processes, pooled):
    """Page by page."""
    every = [value for values in processes for value in values]
    given_ = named(**{f"p{pid}": values for pid, values in enumerate(processes)})
    found = candidates.met(given_, prints(sorted(pooled)), SEED)
    for pid, values in enumerate(processes):
        expected = [every.count(value) > 1 or value in pooled for value in values]
        assert found[pid].tolist() == expected


def test_pages_that_share_a_frame_by_fork_are_not_worth_merging():
    """Unless there is another frame with the same content."""
    pages = named(p1=[1, 2], p2=[1, 2], p3=[2])
    frames = {1: prints([100, 200]), 2: prints([100, 200]), 3: prints([0])}
    found = candidates.worthwhile(pages, frames, prints([]), SEED)
    assert {pid: numbers.tolist() for pid, numbers in found.items()} == {
        1: [10],
        2: [10],
        3: [0],
    }


def test_a_page_that_the_pool_has_is_worth_it_alone():
    """And one of zeros, which the kernel has a frame for."""
    pages = named(p1=[1, ZERO, 3])
    found = candidates.worthwhile(pages, {1: prints([0, 0, 0])}, prints([1]), SEED)
    assert found[1].tolist() == [0, 10]
