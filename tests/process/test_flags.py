"""Flags found by effect, against the ones that smaps tells."""

import contextlib
import ctypes
import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksm import pages
from sksm.linux import libc, maps
from sksm.process.local import ThisProcess
from sksm.spans import PAGE_SIZE, Span
from tests.memory import RW, Area


def flagged_mappings(span):
    with ThisProcess() as space:
        return space.mappings(span)


DONTFORK, DONTDUMP, WIPEONFORK, COLD, HUGEPAGE, NOHUGEPAGE = 10, 16, 18, 20, 14, 15
DEEDS = {
    "dontfork": lambda one, part: libc.madvise(part.start, part.size, DONTFORK),
    "dontdump": lambda one, part: libc.madvise(part.start, part.size, DONTDUMP),
    "wipeonfork": lambda one, part: libc.madvise(part.start, part.size, WIPEONFORK),
    "nohugepage": lambda one, part: libc.madvise(part.start, part.size, NOHUGEPAGE),
    "cold": lambda one, part: libc.madvise(part.start, part.size, COLD),
    "read-only": lambda one, part: libc.mprotect(part.start, part.size, 1),
    "none": lambda one, part: libc.mprotect(part.start, part.size, 0),
    "execute": lambda one, part: libc.mprotect(part.start, part.size, 5),
    "lock": lambda one, part: ctypes.CDLL(None).mlock(
        ctypes.c_void_p(part.start), part.size
    ),
    "unmap": lambda one, part: libc.munmap(part.start, part.size),
}
PAGES = 16
BOUNDS = st.lists(st.integers(0, PAGES), min_size=2, max_size=2, unique=True).map(
    sorted
)


def told(mappings):
    """What of a list of mappings matters to a merge."""
    return [
        (
            m.span,
            m.prot,
            m.shared,
            m.offset,
            m.device,
            m.inode,
            m.path,
            # A single page is refused as the last of its mapping, flags or not.
            m.span.pages == 1 or pages.why_not(m),
        )
        for m in mappings
    ]


@given(
    st.lists(st.tuples(st.sampled_from(sorted(DEEDS)), BOUNDS), max_size=5),
    BOUNDS,
)
def test_trying_tells_what_smaps_tells_and_changes_nothing(deeds, bounds):
    """For mappings of any size and nature, and any part of them."""
    one = Area(PAGES)
    try:
        one.rows[: PAGES // 2] = 7
        for deed, part in deeds:
            with contextlib.suppress(OSError):  # a hole, or locked
                DEEDS[deed](one, one.part(*part))
        span = one.part(*bounds)
        before = maps.mappings("self", one.span)
        found = flagged_mappings(span)
        assert told(found) == told(maps.mappings("self", span))
        assert maps.mappings("self", one.span) == before
    finally:
        one.close()


def test_trying_tells_it_of_everything_this_process_maps():
    """Libraries, stack, the kernel's own: may it merge or not, in a real process."""
    for mapping in maps.mappings("self", Span(0, 1 << 47)):
        found = flagged_mappings(mapping.span)
        grown = [m.span for m in found] != [mapping.span]  # the heap, perhaps
        if not grown and mapping.span.pages > 1:
            same = pages.why_not(found[0]) is None
            assert same == (pages.why_not(mapping) is None), mapping


@pytest.mark.parametrize("pages_of_it", [2, 3])
def test_small_mappings_are_not_taken_for_split_ones(area, pages_of_it):
    """The page that a trial cuts out leaves few or none of its own kind."""
    one = area(pages_of_it)
    one.rows[:] = 1
    (found,) = flagged_mappings(one.span)
    assert pages.why_not(found) is None
    one.advise(DONTFORK)
    (found,) = flagged_mappings(one.span)
    assert pages.why_not(found) == pages._FLAG_REASONS["dc"]
    (after,) = one.mappings()
    assert "dc" in after.flags


@pytest.mark.parametrize("advice", [DONTFORK, DONTDUMP, WIPEONFORK])
def test_a_flag_that_was_found_is_set_again(area, advice):
    """The trial clears it for a page; afterwards every page has it."""
    one = area(9)
    one.rows[:] = 1
    one.advise(advice)
    before = one.mappings()
    for first in range(9):
        flagged_mappings(one.part(first, 9))
    assert one.mappings() == before


def test_without_the_query_smaps_is_read(area, monkeypatch):
    """Before Linux 6.11."""

    def refuse(*_):
        raise OSError(errno.ENOTTY, "ENOTTY")

    one = area(5)
    one.advise(DONTDUMP, 1, 3)
    expected = one.mappings()
    monkeypatch.setattr(maps, "query", refuse)
    assert flagged_mappings(one.span) == expected
    assert [m.prot for m in expected] == [RW] * 3
    assert one.size == 5 * PAGE_SIZE
