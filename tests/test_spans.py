"""Ranges of pages are plain, checked arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksm.spans import PAGE_SIZE, Span, whole_pages

pytestmark = [pytest.mark.check, pytest.mark.pure]


def pages(first, stop):
    return Span(first * PAGE_SIZE, stop * PAGE_SIZE)


@pytest.mark.parametrize(
    ("start", "stop"),
    [(1, PAGE_SIZE), (0, PAGE_SIZE + 1), (2 * PAGE_SIZE, PAGE_SIZE)],
    ids=["start unaligned", "stop unaligned", "backwards"],
)
def test_span_takes_only_whole_pages_in_order(start, stop):
    """A span that exists is one that the kernel would take."""
    with pytest.raises(ValueError, match="page-aligned"):
        Span(start, stop)


def test_span_knows_its_size_in_bytes_and_pages():
    """Lengths are bytes unless the name says pages."""
    span = pages(2, 7)
    assert (span.size, span.pages, str(span)) == (5 * PAGE_SIZE, 5, "0x2000-0x7000")


BOUNDS = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted)


@given(BOUNDS, BOUNDS)
def test_intersection_holds_the_pages_that_both_hold(one, other):
    """`&` is the intersection of sets of pages, also where it is empty."""
    both = pages(*one) & pages(*other)
    held = set(range(both.start // PAGE_SIZE, both.stop // PAGE_SIZE))
    assert held == set(range(*one)) & set(range(*other))


@given(st.integers(0, 5 * PAGE_SIZE), st.integers(0, 5 * PAGE_SIZE))
def test_whole_pages_are_those_with_every_byte_inside(address, length):
    """A page with one byte outside is left out."""
    span = whole_pages(address, length)
    inside = [
        page
        for page in range(11)
        if address <= page * PAGE_SIZE and (page + 1) * PAGE_SIZE <= address + length
    ]
    assert [s // PAGE_SIZE for s in range(span.start, span.stop, PAGE_SIZE)] == inside
