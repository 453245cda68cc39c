"""What merging would save, counted on processes that hold known pages."""

import errno
import mmap
import os

import numpy as np
import pytest

from sksm import holding, pages
from sksm.engines.plan import SHORT_GAP
from sksm.estimate import Estimate
from sksm.linux import pagemap
from sksm.process.other import OtherProcess
from sksm.spans import HUGE_SIZE, PAGE_SIZE, Span
from sksm.store.local import LocalStore
from tests.process.holder import Holder, Window
from tests.process.subject import Subject
from tests.puppets import Obedient
from tests.rows import content


@pytest.fixture
def hold(puppets):
    """Give `hold(kinds)`: a process with a page of each kind, None: untouched."""
    return lambda kinds: Holder(puppets, kinds)


def estimate_of(*holders, **options):
    found = Estimate(**options)
    for one in holders:
        with one.window() as space:
            assert found.add(space)
    return found


def in_pages(figures, *names):
    return [getattr(figures, f"{name}_bytes") / PAGE_SIZE for name in names]


def places(holder, *bounds):
    return [Span(holder.page(first), holder.page(stop)) for first, stop in bounds]


def test_duplicates_zeros_and_runs_are_exact(hold):
    """Of equal pages all but one are duplicates, the first process keeps it."""
    one = hold([1, 2, 0, 0, None, 3, 4])
    two = hold([9, 1, 2, None, 0, 1, 8])
    found = estimate_of(one, two)
    names = "looked", "twin", "kept", "duplicate", "zero", "already"
    assert in_pages(found.figures(one.pid), *names) == [6, 2, 2, 0, 2, 0]
    assert in_pages(found.figures(two.pid), *names) == [6, 3, 0, 3, 1, 0]
    assert in_pages(found.total(), *names) == [12, 5, 2, 3, 3, 0]
    assert (found.figures(one.pid).runs, found.figures(two.pid).runs) == (1, 2)
    assert found.total().refused_bytes[pages.LAST_PAGE] == 2 * PAGE_SIZE
    assert pages.UNTOUCHED not in found.total().refused_bytes


def test_equal_pages_of_one_process_are_duplicates(hold):
    """It need not be another's."""
    one = hold([5, 5, 5, 6])
    found = estimate_of(one)
    assert in_pages(found.total(), "twin", "duplicate") == [3, 2]
    assert found.twins(one.pid) == places(one, (0, 3))


def test_spans_hold_twins_zeros_and_short_gaps(hold):
    """A gap counts as short while all its pages are candidates."""
    alone = range(100, 100 + SHORT_GAP + 1)
    short = range(200, 200 + SHORT_GAP)
    one = hold([1, *short, 2, *alone, 3, 50, 0, None, 1])
    two = hold([1, 2, 3])
    found = estimate_of(one, two)
    second, third = SHORT_GAP + 1, 2 * SHORT_GAP + 3
    assert found.twins(one.pid) == places(
        one, (0, second + 1), (third, third + 3), (third + 4, third + 5)
    )
    figures = found.figures(one.pid)
    assert figures.span_pages == second + 1 + 3 + 1
    assert figures.runs == 5


def test_mappings_are_those_of_straight_runs(hold):
    """The same order in both: one mapping. Another order, or a gap: more."""
    one = hold([1, 2, 3, 4, 5, 6])
    two = hold([1, 2, 77, 4, 6, 5])
    found = estimate_of(one, two)
    # One keeps 1, 2, (3), 4, 5, 6: page 3 is not stored. Two: 1 2, 4, 6, 5.
    assert found.figures(one.pid).mappings == 2
    assert found.figures(two.pid).mappings == 4
    assert found.figures(two.pid).runs == 2


def test_pages_that_fork_shares_are_no_duplicates(hold):
    """Parent and child hold them once; what the parent wrote since is two frames."""
    parent = hold([1, 2, 3, 4, 1])
    child = parent.ask("fork")
    parent.ask("put", 1, 20)
    parent.ask("put", 2, 3)  # written, and equal all the same
    found = Estimate()
    for pid in (parent.pid, child):
        with parent.window(pid) as space:
            found.add(space)
    names = "duplicate", "already", "twin"
    assert in_pages(found.figures(parent.pid), *names) == [2 - 1, 0, 3]
    assert in_pages(found.figures(child), *names) == [1, 3, 3]
    assert found.twins(child) == places(parent, (0, 5))


def test_reading_leaves_the_pages_that_fork_shares_shared(hold):
    """A read that pins would have the kernel copy each of them first."""
    parent = hold([1, 1, 0, None])
    parent.ask("fork")
    with parent.window() as space:
        before = pagemap.entries(space.pagemap(), parent.span)
        Estimate().add(space)
        after = pagemap.entries(space.pagemap(), parent.span)
    assert before.tolist() == after.tolist()
    assert not (before & np.uint64(pagemap.ENTRY_EXCLUSIVE)).any()


def test_pages_shared_with_a_process_outside_the_set_free_nothing(hold):
    """Their frame stays for the other."""
    parent = hold([1, 1, 2, 0])
    parent.ask("fork")
    found = estimate_of(parent)
    assert in_pages(found.total(), "duplicate", "zero", "already") == [0, 0, 4]
    assert found.twins(parent.pid) == []


def test_pages_known_to_a_store_are_twins(hold, memory):
    """A single page is a duplicate of the one in the pool."""
    one = hold([1, 2, 3])
    store = LocalStore()
    with one.window() as space:
        store.offer(os.getpid(), [local_copy(memory, space, one.page(1))])
    found = estimate_of(one, seed=store.seed, known=store.knows)
    store.close()
    assert found.twins(one.pid) == places(one, (1, 2))
    assert in_pages(found.total(), "twin", "duplicate", "kept") == [1, 1, 0]


def local_copy(memory, space, address):
    copy = memory(1)
    copy.rows[:] = space.read([Span(address, address + PAGE_SIZE)])
    local_copy.kept = copy
    return copy.span


def test_a_process_that_ended_holds_nothing(hold):
    """Before it was read, and while it is."""
    one, two = hold([1, 2]), hold([1, 2])
    space = two.window()
    two.process.end()
    found = estimate_of(one)
    with space:
        assert not found.add(space)
    assert list(found.holdings) == [one.pid]
    assert found.total().duplicate_bytes == 0


def test_pages_that_vanish_are_counted(hold, monkeypatch):
    """The kernel stops at the first; what lies around is read in smaller parts."""
    one = hold(list(range(1, 301)))

    class Shaky(Window):
        def read(self, spans):
            if any(span.start <= one.page(10) < span.stop for span in spans):
                raise OSError(errno.EFAULT, "gone")
            return super().read(spans)

    found = Estimate()
    with Shaky(one.pid, one.span) as space:
        assert found.add(space)
    lost = found.total().refused_bytes[holding.VANISHED] // PAGE_SIZE
    assert lost == holding._PART_PAGES
    assert found.total().looked_bytes == (300 - lost) * PAGE_SIZE


def test_scattered_pages_are_all_read(hold):
    """Each with its own table entry, near the next or far from it."""
    kinds = [1, None, 2, *[None] * 100, 3, 4, *[None] * 300, 5]
    one = hold(kinds)
    one.ask("fork")
    one.ask("put", 103, 3)
    found = estimate_of(one).holdings[one.pid]
    assert (found.numbers * PAGE_SIZE).tolist() == [
        one.page(index) for index, kind in enumerate(kinds) if kind
    ]
    assert (found.frames == 0).tolist() == [False, False, True, False, False]


def test_kernels_without_the_scan_give_the_same(hold, monkeypatch):
    """Page by page from the table; but they do not tell huge pages."""
    one, two = hold([1, 2, 0, None, 3]), hold([2, 1, 0, 4])
    expected = estimate_of(one, two).total()

    def lacking(*_, **__):
        raise OSError(errno.ENOTTY, "ENOTTY")

    monkeypatch.setattr(pagemap, "scan", lacking)
    assert estimate_of(one, two).total() == expected


def test_huge_pages_are_counted_once_a_page_of_them_has_a_twin(puppets):
    """2 MiB each, whatever the number of twins."""
    process = puppets(Huge)
    with Window(process.pid, Span(*process.where())) as space:
        found = Estimate()
        found.add(space)
        huge = found.holdings[process.pid].huge
        if not len(huge):
            pytest.skip("no huge pages here")
        assert (huge * PAGE_SIZE % HUGE_SIZE == 0).all()
        twin = np.array(found.twins(process.pid)[0].start) // PAGE_SIZE
        inside = (huge <= twin) & (twin < huge + 512)
        assert found.total().huge_bytes == inside.sum() * HUGE_SIZE


class Huge(Obedient):
    """Holds huge pages, and two pages that are equal."""

    def __init__(self):
        self.show()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        area = mmap.mmap(-1, 4 * HUGE_SIZE, flags=flags)
        area.madvise(mmap.MADV_HUGEPAGE)
        self.rows = np.frombuffer(area, np.uint8).reshape(-1, PAGE_SIZE)
        self.rows[:] = content(1, len(self.rows))
        self.rows[1000] = self.rows[1001]

    def where(self):
        start = self.rows.ctypes.data
        return start, start + self.rows.nbytes


def test_a_whole_interpreter_can_be_looked_at(worker):
    """All its mappings, special ones included, and it goes on as before.

    Started: what is forked has nearly all of its pages in common.
    """
    one, two = Subject(worker), Subject(worker)
    found = Estimate()
    for process in (one, two):
        with OtherProcess(process.pid) as space:
            assert found.add(space)
    total = found.total()
    assert 0 < total.duplicate_bytes < total.twin_bytes < total.looked_bytes
    assert total.twin_bytes == total.duplicate_bytes + total.kept_bytes
    assert pages.UNWRITTEN_FILE in total.refused_bytes
    assert one.do("6 * 7") == 42
