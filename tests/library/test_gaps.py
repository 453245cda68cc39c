"""Few mappings: short gaps are covered, and the budget is kept."""

import numpy as np
import pytest

import sksm
from sksm import session
from sksm.engines.plan import SHORT_GAP
from sksm.engines.pool import TOO_MANY_MAPPINGS
from sksm.linux import libc
from sksm.process import EXCHANGE_PAGES
from sksm.spans import PAGE_SIZE

pytestmark = pytest.mark.usefixtures("here", "threads")


@pytest.fixture
def twins(area, different):
    """Give `twins(n)`: two areas of the same n pages; the first is merged."""

    def make(pages):
        one, two = area(pages + 1), area(pages + 1)
        one.rows[:] = two.rows[:] = different(pages + 1)
        sksm.merge_range(one.address, pages * PAGE_SIZE)
        return one, two

    return make


def merged(one, *, never_drops=True):
    span = one.part(0, len(one.rows) - 1)
    return session.current.merge(span, pinned=False, never_drops=never_drops)


def test_every_tenth_page_different_takes_one_mapping(twins, different):
    """90 % share a frame; the tenth keeps its bytes inside the same mapping.

    (Or a few: mappings with private pages of their own need not join.)
    """
    _one, two = twins(1000)
    two.rows[5:1000:10] = different(100)
    content = two.rows.copy()

    report = merged(two)

    # Where the range is cut into batches, a gap may be cut off its run, and stored.
    assert (report.merged, report.unique + report.stored) == (900, 100)
    assert report.stored <= 1
    assert report.mappings_added <= 4
    assert (two.rows == content).all()


@pytest.mark.root
def test_pages_in_a_gap_have_frames_of_their_own(twins, different):
    """Covered, and not shared."""
    one, two = twins(40)
    two.rows[7:9] = different(2)
    merged(two)
    shared = (one.frames() == two.frames())[:40].tolist()
    assert shared == [page not in (7, 8) for page in range(40)]


def test_a_gap_keeps_read_only_memory_read_only(twins, different):
    """Its bytes are written into a mapping that then gets its protection."""
    _one, two = twins(20)
    two.rows[7:9] = different(2)
    content = two.rows.copy()
    two.protect(1)
    report = merged(two)
    assert (report.merged, report.unique) == (18, 2)
    assert {m.prot for m in two.mappings()} == {1}
    assert (two.rows == content).all()


def test_no_gap_is_covered_where_its_pages_may_be_dropped(twins, different):
    """What lies in the pool behind such a page would show: another program's bytes."""
    _one, two = twins(40)
    two.rows[7:9] = different(2)
    two.rows[20] = different(1)
    content = two.rows.copy()
    assert merged(two, never_drops=False).merged == 37
    for page in range(len(two.rows)):
        two.advise(libc.MADV_DONTNEED, page, page + 1)
        dropped = two.rows[page]
        assert not dropped.any() or (dropped == content[page]).all(), page


def test_a_gap_is_covered_by_slots_that_stay_only(twins, different, here, monkeypatch):
    """If one of them could be used for other pages, the run is cut there."""
    _one, two = twins(40)
    two.rows[7:9] = different(2)
    content = two.rows.copy()
    monkeypatch.setattr(here, "claim", lambda slot, pages: pages < 9)
    report = merged(two)
    assert (report.merged, report.unique) == (38, 2)
    assert report.mappings_added >= 3
    assert (two.rows == content).all()


def test_gaps_that_are_too_long_are_stored(twins, different):
    """They get slots, and mappings, of their own."""
    gap = SHORT_GAP + 1
    _one, two = twins(3 * gap)
    two.rows[gap : 2 * gap] = different(gap)
    report = merged(two)
    assert (report.merged, report.stored, report.unique) == (2 * gap, gap, 0)


def test_own_pages_of_a_gap_merge_when_offered_again_elsewhere(twins, different, area):
    """They are left out of the pool, not forbidden there."""
    _one, two = twins(20)
    two.rows[7] = different(1)
    merged(two)
    three = area(4)
    three.rows[:] = two.rows[7]
    assert sksm.merge_range(*three.where).stored == 1


def test_scattered_duplicates_merge_in_any_order(twins):
    """Every page finds its twin, wherever that is, and stays what it was."""
    one, two = twins(500)
    order = np.random.default_rng(3).permutation(500)
    two.rows[:500] = one.rows[order]
    content = two.rows.copy()

    report = merged(two)

    assert report.merged == 500
    assert (two.rows == content).all()
    assert (two.rows[:500] == one.rows[order]).all()


@pytest.mark.check
@pytest.mark.root
def test_scattered_duplicates_share_the_frames_of_their_twins(twins):
    """By frame numbers, page by page."""
    one, two = twins(200)
    order = np.random.default_rng(4).permutation(200)
    two.rows[:200] = one.rows[order]
    merged(two)
    assert (two.frames()[:200] == one.frames()[:200][order]).all()


def test_duplicates_within_one_range_merge_with_each_other(area, different):
    """One of them is stored, the others share it, in the very first call."""
    one = area(101)
    one.rows[:] = different(1)
    report = merged(one)
    assert (report.stored, report.merged) == (1, 99)
    assert (one.rows == one.rows[0]).all()


@pytest.mark.parametrize("pages", [EXCHANGE_PAGES - 1, 2 * EXCHANGE_PAGES + 3, 9000])
def test_long_runs_are_one_mapping(twins, pages):
    """However many exchanges and batches they take."""
    one, two = twins(pages)
    report = merged(two)
    assert (report.merged, report.scanned) == (pages, pages)
    assert report.mappings_added <= 2
    assert (one.rows == two.rows).all()


def test_runs_that_begin_anywhere_in_the_pool_are_followed(twins, area):
    """A part of what was stored, at another distance from a huge page."""
    one, _ = twins(3000)
    part = area(1001)
    part.rows[:] = one.rows[777 : 777 + 1001]
    report = merged(part)
    assert (report.merged, report.mappings_added) == (1000, 1)
    assert (part.rows == one.rows[777 : 777 + 1001]).all()


def test_a_change_far_inside_a_long_run_costs_only_its_page(twins):
    """The run is followed without fingerprints; the page that differs is found."""
    _one, two = twins(9000)
    two.rows[8000, 17] ^= 1
    content = two.rows.copy()
    report = merged(two)
    assert report.merged == 8999
    assert report.unique + report.stored == 1
    assert (two.rows == content).all()


def test_at_the_limit_of_mappings_the_rest_is_refused(twins, few_mappings):
    """Counted under the reason; the longest runs come first; nothing breaks."""
    one, two = twins(100)
    order = np.random.default_rng(5).permutation(60)
    two.rows[:60] = one.rows[order]  # the last forty are a run
    content = two.rows.copy()
    few_mappings(20)

    report = merged(two)

    assert 40 <= report.merged < 100
    assert report.reasons == {TOO_MANY_MAPPINGS: 100 - report.merged}
    assert report.mappings_added <= 21
    assert (two.rows == content).all()


def test_without_any_mapping_left_all_is_refused(twins, few_mappings):
    """And nothing is an error."""
    one, two = twins(10)
    few_mappings(0)
    report = merged(two)
    assert report.reasons == {TOO_MANY_MAPPINGS: 10}
    assert (one.rows == two.rows).all()


def test_zero_pages_need_no_mapping_and_ignore_the_limit(area, few_mappings):
    """They are given back inside the mapping there is."""
    one = area(11)
    one.rows[:] = 1
    one.rows[:] = 0
    few_mappings(0)
    assert merged(one).zero == 10
