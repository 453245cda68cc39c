"""Pages of zeros become the kernel's own, wherever they are."""

import numpy as np
import pytest

import sksm
from sksm.spans import PAGE_SIZE

pytestmark = pytest.mark.usefixtures("here", "threads")


@pytest.fixture
def zeroed(area):
    """Give `zeroed(n)`: n + 1 pages that were written, with zeros."""

    def make(pages):
        one = area(pages + 1)
        one.rows[:] = 1
        one.rows[:] = 0
        return one

    return make


@pytest.mark.root
def test_pages_of_zeros_become_the_zero_page(zeroed, zero_frame):
    """They cost nothing any more, and are counted by themselves."""
    one = zeroed(8)
    assert zero_frame not in one.frames()

    report = sksm.merge_range(one.address, 8 * PAGE_SIZE)

    assert (report.zero, report.scanned, report.mappings_added) == (8, 8, 0)
    assert (one.frames()[:8] == zero_frame).all()
    assert not one.rows.any()


def test_zeros_amid_data_cost_no_memory_in_the_pool(zeroed, different, here):
    """Data and zeros in turns; each is what it was."""
    one = zeroed(9)
    one.rows[[0, 1, 4, 8]] = different(4)
    content = one.rows.copy()

    report = sksm.merge_range(one.address, 9 * PAGE_SIZE)

    assert (report.stored, report.zero) == (4, 5)
    assert here.usage()["slots"] == 4
    assert (one.rows == content).all()


@pytest.mark.root
def test_zeros_amid_data_become_the_zero_page(zeroed, different, zero_frame):
    """In stored and in merged memory alike."""
    content = different(9)
    content[[2, 3, 6]] = 0
    one, two = zeroed(9), zeroed(9)
    for each in (one, two):
        each.rows[:9] = content
        sksm.merge_range(each.address, 9 * PAGE_SIZE)
        is_zero = (each.frames()[:9] == zero_frame).tolist()
        assert is_zero == [page in (2, 3, 6) for page in range(9)]
        assert (each.rows[:9] == content).all()


@pytest.mark.root
def test_a_merged_page_that_was_cleared_becomes_the_zero_page(
    area, different, zero_frame
):
    """A merged range is of the pool's file: the zero page needs a mapping there."""
    one = area(7)
    one.rows[:] = different(7)
    sksm.merge_range(*one.where)
    content = one.rows.copy()
    one.rows[3] = content[3] = 0

    report = sksm.merge_range(*one.where)

    assert (report.zero, report.already) == (1, 5)
    assert one.frames()[3] == zero_frame
    assert (one.rows == content).all()
    assert sksm.merge_range(*one.where).already >= 5


def test_the_zero_page_is_already_merged(zeroed):
    """Merging it again changes nothing; so does a first read of fresh memory."""
    one = zeroed(4)
    sksm.merge_range(one.address, 4 * PAGE_SIZE)
    report = sksm.merge_range(one.address, 4 * PAGE_SIZE)
    assert (report.already, report.scanned) == (4, 4)


@pytest.mark.check
def test_a_page_that_differs_in_its_last_byte_is_not_zero(zeroed):
    """Every byte is looked at."""
    one = zeroed(3)
    one.rows[1, -1] = 1
    report = sksm.merge_range(one.address, 3 * PAGE_SIZE)
    assert (report.zero, report.stored) == (2, 1)
    assert np.flatnonzero(one.rows).tolist() == [2 * PAGE_SIZE - 1]


@pytest.mark.check
def test_a_write_to_a_zero_page_stays_with_the_writer(zeroed):
    """The kernel copies it, as any page of fresh memory."""
    one, two = zeroed(4), zeroed(4)
    for each in (one, two):
        sksm.merge_range(each.address, 4 * PAGE_SIZE)
    one.rows[2] = 5
    assert not two.rows.any()
    assert np.flatnonzero(one.rows.any(axis=1)).tolist() == [2]
