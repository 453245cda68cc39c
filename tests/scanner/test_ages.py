"""What a scanner remembers of pages, against a dict of each."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sksm.linux.pagemap import PAGE_REGION, numbers_of
from sksm.scanner.ages import Pages
from sksm.spans import HUGE_SIZE, PAGE_SIZE

pytestmark = [pytest.mark.check, pytest.mark.pure]

QUIET = 3.0
# Few blocks, far apart, so that pages are met again; and their edges.
PAGES = [block * 512 + at for block in (0, 1, 7, 1 << 35) for at in (0, 1, 511)]
some = st.lists(st.sampled_from(PAGES), unique=True).map(sorted)
steps = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["write", "strike", "merge", "forget", "name"]), some
        ),
        st.tuples(st.just("pass"), st.integers(1, 300)),
    ),
    max_size=40,
)


class Naive:
    """The same, page by page."""

    def __init__(self):
        self.age, self.strikes, self.merged, self.print = {}, {}, set(), {}

    def possible(self, what, page):
        if what == "name":
            return page in self.age
        return what != "strike" or page not in self.merged

    def touch(self, page):
        self.age[page] = 0
        self.print.pop(page, None)

    def write(self, page):
        if page in self.merged:
            self.merged.discard(page)
            self.strikes[page] = min(15, self.strikes.get(page, 0) + 1)
        self.touch(page)

    def strike(self, page):
        if page not in self.merged:
            self.strikes[page] = min(15, self.strikes.get(page, 0) + 1)
            self.touch(page)

    def merge(self, page):
        self.merged.add(page)
        self.touch(page)

    def forget(self, page):
        self.age.pop(page, None)
        self.print.pop(page, None)
        self.strikes.pop(page, None)
        self.merged.discard(page)

    def name(self, page):
        self.print[page] = page + 1

    def due(self):
        return [
            page
            for page in sorted(self.age)
            if page not in self.merged
            and page not in self.print
            and self.age[page]
            >= min(254, math.ceil(QUIET) * 2 ** self.strikes.get(page, 0))
        ]


def numbers(pages):
    return np.array(pages, np.int64)


@given(steps)
@settings(deadline=None, max_examples=300)
def test_it_remembers_what_a_dict_would(done):
    """Whatever happens, in whatever order."""
    pages, naive = Pages(QUIET), Naive()
    for what, which in done:
        if what == "pass":
            pages.grow_older(which)
            naive.age = {p: min(254, age + which) for p, age in naive.age.items()}
            continue
        possible = [page for page in which if naive.possible(what, page)]
        at = numbers(possible)
        prints = (at.astype(np.uint64) + np.uint64(1),) if what == "name" else ()
        getattr(pages, what)(at, *prints)
        for page in possible:
            getattr(naive, what)(page)
        assert pages.due().tolist() == naive.due()
        assert pages.merged() == len(naive.merged)
        assert pages.seen() == len(naive.age)
        known, prints = pages.named()
        assert dict(zip(known.tolist(), prints.tolist(), strict=True)) == naive.print


def test_a_page_that_does_not_stay_merged_waits_twice_as_long_each_time():
    """3, 6, 12 seconds and so on; never for ever."""
    pages, one = Pages(QUIET), numbers([5])
    waited = []
    pages.write(one)
    for _ in range(8):
        seconds = 0
        while not len(pages.due()):
            pages.grow_older(1)
            seconds += 1
        waited.append(seconds)
        pages.merge(one)
        assert pages.write(one) == 1
    assert waited == [3, 6, 12, 24, 48, 96, 192, 254]


def test_pages_of_mappings_that_are_gone_are_forgotten():
    """By blocks: a mapping that keeps a part of one keeps the block."""
    pages = Pages(QUIET)
    pages.write(numbers([0, 512, 1024, 5 * 512]))
    inside = (HUGE_SIZE + PAGE_SIZE, HUGE_SIZE + 2 * PAGE_SIZE)
    pages.keep(numbers([inside, (5 * HUGE_SIZE, 9 * HUGE_SIZE)]))
    pages.grow_older(3)
    assert pages.due().tolist() == [512, 5 * 512]
    pages.keep(np.empty((0, 2), np.int64))
    assert pages.seen() == 0


def test_fingerprints_of_pages_are_given_only_if_all_are_known():
    """Else who asks must read them."""
    pages = Pages(QUIET)
    pages.write(numbers([1, 2, 3]))
    pages.name(numbers([1, 2]), np.array([10, 20], np.uint64))
    assert pages.names(numbers([1, 2])).tolist() == [10, 20]
    assert pages.names(numbers([1, 2, 3])) is None
    pages.forget_prints()
    assert pages.names(numbers([1])) is None


def test_a_page_takes_ten_bytes():
    """Where a process uses whole blocks."""
    pages = Pages(QUIET)
    pages.write(np.arange(100 * 512))
    assert pages.nbytes / (100 * 512) == pytest.approx(10, abs=0.1)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=20))
def test_runs_are_listed_page_by_page(gaps):
    """In order, none twice."""
    runs, at = [], 0
    for gap, length in gaps:
        runs.append((at + gap, at + gap + length))
        at += gap + length
    region = np.zeros(len(runs), PAGE_REGION)
    region["start"] = [start * PAGE_SIZE for start, _ in runs]
    region["end"] = [stop * PAGE_SIZE for _, stop in runs]
    expected = [page for start, stop in runs for page in range(start, stop)]
    assert numbers_of(region).tolist() == expected
