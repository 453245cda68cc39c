"""`merge_range` and `unmerge`: the raw forms, and what they do about bad ranges."""

import errno

import numpy as np
import pytest

import sksm
from sksm import api, pages
from sksm.engines.pool import PoolEngine
from sksm.linux import libc, maps
from sksm.pipeline import merge
from sksm.process.local import ThisProcess
from sksm.report import OUTCOMES, MergeReport
from sksm.spans import PAGE_SIZE
from tests.memory import RW

pytestmark = pytest.mark.usefixtures("here")

CALLS = [sksm.merge_range, sksm.unmerge_range]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("address", "length", "named"),
    [
        (PAGE_SIZE + 1, PAGE_SIZE, "address"),
        (PAGE_SIZE, PAGE_SIZE - 1, "length"),
        (PAGE_SIZE, 1, "length"),
        (-PAGE_SIZE, PAGE_SIZE, "address"),
        (PAGE_SIZE, -PAGE_SIZE, "length"),
    ],
)
def test_a_range_of_broken_pages_is_a_value_error(call, address, length, named):
    """The message names what was wrong, and with which number."""
    with pytest.raises(ValueError, match=rf"^{named} .*page size"):
        call(address, length)


def test_nothing_is_asked_and_nothing_done_for_a_length_of_zero(monkeypatch):
    """As madvise: no error, wherever the address points, and no daemon."""
    monkeypatch.setattr(api.session, "current", None)
    assert sksm.merge_range(PAGE_SIZE, 0) == MergeReport()


def test_a_hole_is_an_error_after_the_rest_was_merged(area, different):
    """ENOMEM, as madvise says it; what is mapped before and behind was handled."""
    one, two = area(12), area(12)
    one.rows[:] = two.rows[:] = different(12)
    sksm.merge_range(*one.where)
    libc.munmap(two.address + 5 * PAGE_SIZE, 2 * PAGE_SIZE)

    with pytest.raises(OSError, match="2 of 12 pages") as caught:
        sksm.merge_range(*two.where)

    assert caught.value.errno == errno.ENOMEM
    shown = [m.span for m in two.mappings() if pages.is_pool(m)]
    assert shown == [two.part(0, 4), two.part(7, 11)]
    assert (two.rows[:5] == one.rows[:5]).all()
    assert (two.rows[7:] == one.rows[7:]).all()


def test_a_range_of_nothing_is_an_error():
    """Not one page is mapped."""
    with pytest.raises(OSError, match="2 of 2 pages") as caught:
        sksm.merge_range(PAGE_SIZE, 2 * PAGE_SIZE)
    assert caught.value.errno == errno.ENOMEM


def test_a_second_merge_of_a_range_changes_nothing(area, different):
    """Mappings, bytes, the pool: all as they were."""
    one = area(50)
    one.rows[:] = different(50)
    sksm.merge_range(*one.where)
    before = maps.mappings("self", one.span)
    content = one.rows.copy()
    report = sksm.merge_range(*one.where)
    assert (report.already, report.refused, report.mappings_added) == (49, 1, 0)
    assert maps.mappings("self", one.span) == before
    assert (one.rows == content).all()


def test_a_merge_of_what_was_written_since_merges_just_that(area, different):
    """The rest is already merged."""
    one, two = area(50), area(50)
    one.rows[:] = two.rows[:] = different(50)
    sksm.merge_range(*one.where)
    sksm.merge_range(*two.where)
    two.rows[10:20] = different(10)
    two.rows[30] = one.rows[3]
    content = two.rows.copy()
    report = sksm.merge_range(*two.where)
    assert (report.stored, report.merged, report.already) == (10, 1, 38)
    assert (two.rows == content).all()


class Vanishing(ThisProcess):
    """An address space in which somebody unmaps pages at a chosen moment."""

    def __init__(self, moment, vanish):
        super().__init__()
        self.moment, self.vanish = moment, vanish

    def read(self, spans):
        if self.moment == "before reading":
            self.vanish()
        rows = super().read(spans)
        if self.moment == "after reading":
            self.vanish()
        return rows

    def exchange(self, pool, exchanges):
        if self.moment == "before the exchange":
            self.vanish()
        verdicts = super().exchange(pool, exchanges)
        if self.moment == "after the exchange":
            self.vanish()
        return verdicts


MOMENTS = ["before reading", "after reading", "before the exchange"]


@pytest.fixture(params=["stored", "merged"])
def offered(request, area, different):
    """Pages that nobody offered before, and pages that somebody did."""
    one = area(21)
    one.rows[:] = different(21)
    if request.param == "merged":
        twin = area(21)
        twin.rows[:] = one.rows
        sksm.merge_range(*twin.where)
    return one


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("moment", [*MOMENTS, "after the exchange"])
@pytest.mark.parametrize("hole", [(0, 20), (0, 1), (7, 9), (15, 20)], ids=str)
def test_memory_unmapped_meanwhile_is_an_outcome(offered, here, moment, hole):
    """No crash, no exception; the report adds up, and what is left is intact."""
    one, content = offered, offered.rows.copy()
    part = one.part(*hole)

    space = Vanishing(moment, lambda: libc.munmap(part.start, part.size))
    with space:
        report = merge(space, one.part(0, 20), engine=PoolEngine(here))

    assert report.scanned == 20
    assert sum(getattr(report, name) for name in OUTCOMES) == 20
    if moment in MOMENTS:
        assert report.refused + report.changed >= 1
    left = [page for page in range(21) if not hole[0] <= page < hole[1]]
    assert (one.rows[left] == content[left]).all()


# -- unmerge


@pytest.mark.check
@pytest.mark.usefixtures("threads")
def test_unmerged_memory_is_anonymous_and_private_again(area, different):
    """Same bytes, same protection, and no trace of the pool."""
    one = area(30)
    content = one.rows[:] = different(30)
    one.protect(libc.PROT_READ, 10, 20)
    sksm.merge_range(*one.where)
    shared = sum(m.span.pages for m in one.mappings() if pages.is_pool(m))

    assert sksm.unmerge_range(*one.where) == shared * PAGE_SIZE

    assert not any(m.inode for m in one.mappings())
    prots = [m.prot for m in one.mappings() for _ in range(m.span.pages)]
    assert prots == [RW] * 10 + [libc.PROT_READ] * 10 + [RW] * 10
    assert (one.rows == content).all()


@pytest.mark.root
def test_unmerged_pages_have_frames_of_their_own(area, different):
    """No page of one is a page of the other any more."""
    one, two = area(9), area(9)
    one.rows[:] = two.rows[:] = different(9)
    for each in (one, two):
        sksm.merge_range(*each.where)
    assert (one.frames() == two.frames())[:8].all()
    sksm.unmerge_range(*two.where)
    assert not np.isin(one.frames(), two.frames()).any()


def test_a_part_can_be_unmerged(area, different):
    """Just the pages asked for; the rest stays shared."""
    one = area(11)
    content = one.rows[:] = different(11)
    sksm.merge_range(*one.where)
    part = one.part(3, 5)
    assert sksm.unmerge_range(part.start, part.size) == 2 * PAGE_SIZE
    shown = [m.span for m in one.mappings() if pages.is_pool(m)]
    assert shown == [one.part(0, 3), one.part(5, 10)]
    assert (one.rows == content).all()


@pytest.mark.check
def test_dropped_pages_read_as_zeros_after_unmerging(area, different):
    """MADV_DONTNEED does what it does to anonymous memory."""
    one = area(11)
    content = one.rows[:] = different(11)
    sksm.merge_range(*one.where)
    sksm.unmerge_range(*one.where)
    one.advise(libc.MADV_DONTNEED, 2, 4)
    content[2:4] = 0
    assert (one.rows == content).all()


def test_unmerging_what_is_not_merged_does_nothing(area, different):
    """Not even to pages that were written since."""
    one = area(5)
    content = one.rows[:] = different(5)
    assert sksm.unmerge_range(*one.where) == 0
    assert (one.rows == content).all()


def test_unmerged_pages_merge_again(area, different):
    """Nothing is remembered against them."""
    one = area(9)
    one.rows[:] = different(9)
    sksm.merge_range(*one.where)
    sksm.unmerge_range(*one.where)
    report = sksm.merge_range(*one.where)
    assert report.merged >= 7
    assert report.merged + report.reasons[pages.LAST_PAGE] == 9


def test_unmerging_without_memory_changes_nothing(area, different, monkeypatch):
    """It says how much it would need."""
    one = area(9)
    one.rows[:] = different(9)
    sksm.merge_range(*one.where)
    before = one.mappings()

    class Full:
        available = PAGE_SIZE

    monkeypatch.setattr("psutil.virtual_memory", lambda: Full)
    with pytest.raises(sksm.SksmError, match=str(8 * PAGE_SIZE)):
        sksm.unmerge_range(*one.where)
    assert one.mappings() == before
