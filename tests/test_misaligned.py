"""Equal bytes at other offsets: sampled search against the obvious one."""

import errno
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sksm import misaligned
from sksm.misaligned import LEAST_PAGES, Part, anchors, search
from sksm.process import pages_of
from sksm.spans import PAGE_SIZE

pytestmark = [pytest.mark.check, pytest.mark.pure]


def noise(seed, size):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


class Space:
    """Memory that is one run of pages from page `first` on."""

    def __init__(self, content, first):
        self.pages, self.first = content.reshape(-1, PAGE_SIZE), first
        self.pid = first

    @property
    def numbers(self):
        return np.arange(self.first, self.first + len(self.pages))

    def read(self, spans):
        index = pages_of(spans) - self.first
        if (index < 0).any() or (index >= len(self.pages)).any():
            raise OSError(errno.EFAULT, "not mapped")
        return self.pages[index].copy()


def part(content, first, alone=None):
    space = Space(content, first)
    flags = np.ones(len(space.pages), bool) if alone is None else alone
    return Part(space, space.numbers, flags)


def slowly(parts):
    """Search each page in all that comes before it, at every other offset."""
    found = []
    for owner, one in enumerate(parts):
        flags = []
        for page, alone in zip(one.space.pages, one.alone, strict=True):
            here = any(
                is_in(page, other.space.pages.reshape(-1)) for other in parts[:owner]
            )
            flags.append(bool(here and alone))
        found.append(flags)
    return found


def is_in(page, flat):
    text, wanted, at = flat.tobytes(), page.tobytes(), -1
    while (at := text.find(wanted, at + 1)) >= 0:
        if at % PAGE_SIZE:
            return True
    return False


OFFSETS = st.integers(0, PAGE_SIZE // 16 - 1).map(lambda steps: steps * 16)


def placed(data, offset, pages, seed):
    """Put data at an offset into pages of noise."""
    flat = noise(seed, pages * PAGE_SIZE)
    flat[offset : offset + len(data)] = data
    return flat


@settings(deadline=None, max_examples=30)
@given(
    st.lists(OFFSETS, min_size=2, max_size=3, unique=True),
    st.integers(LEAST_PAGES, 3 * LEAST_PAGES),
    st.integers(0, 1000),
)
def test_pages_found_are_those_of_the_obvious_way(offsets, pages, seed):
    """Whatever the offsets: all whole pages of the array, and no other."""
    data = noise(seed, pages * PAGE_SIZE)
    parts = [
        part(placed(data, offset, pages + 2, (seed, number)), 1000 * (number + 1))
        for number, offset in enumerate(offsets)
    ]
    assert [flags.tolist() for flags in search(parts)] == slowly(parts)


def test_one_changed_byte_takes_its_page_out():
    """Bytes decide."""
    data = noise(1, 32 * PAGE_SIZE)
    parts = [part(placed(data, at, 34, at), 100 + at) for at in (16, 64)]
    parts[1].space.pages[20, 5] ^= 1
    expected = [False, *[True] * 31, False, False]
    expected[20] = False
    assert search(parts)[1].tolist() == expected


def test_pages_with_twins_do_not_count_themselves():
    """Others may equal them all the same, in whatever order they come."""
    data = noise(1, 32 * PAGE_SIZE)
    one = part(placed(data, 16, 34, 2), 100)
    two = part(placed(data, 64, 34, 3), 500, alone=np.zeros(34, bool))
    for parts in ([one, two], [two, one]):
        found = dict(zip((p.space.pid for p in parts), search(parts), strict=True))
        assert found[500].sum() == 0
        assert found[100].sum() >= 31


def test_same_offset_is_no_matter_of_this():
    """Aligned twins are found by fingerprint."""
    data = noise(1, 32 * PAGE_SIZE)
    assert not search([part(data, 100), part(data, 500)])[1].any()


def test_an_array_twice_in_one_process_is_found():
    """As two rows of a matrix whose rows are no whole pages."""
    data = noise(1, 32 * PAGE_SIZE)
    flat = np.concatenate([data, noise(2, 48), data, noise(3, PAGE_SIZE - 48)])
    assert search([part(flat, 100)])[0].sum() == 31


@pytest.mark.parametrize("period", [1, 16, 32, 48])
def test_patterns_cost_nothing(period):
    """Padding and repetition have no anchors, or few; they would be everywhere."""
    rows = np.tile(noise(period, period), 48 * PAGE_SIZE // period)
    at, _ = anchors(rows[: 16 * PAGE_SIZE].reshape(-1, PAGE_SIZE))
    assert len(at) <= 16 * misaligned._MOST_ANCHORS


def test_memory_that_is_gone_is_not_found():
    """Between two reads, in either place."""
    data = noise(1, 32 * PAGE_SIZE)
    parts = [part(placed(data, at, 34, at), 100 + at) for at in (16, 64)]
    parts[0].space.pages = parts[0].space.pages[:20]
    assert search(parts)[1].sum() == 0


def test_nothing_to_look_at_finds_nothing():
    """No process, or one without pages."""
    assert search([]) == []
    none = Part(types.SimpleNamespace(), np.empty(0, np.int64), np.empty(0, bool))
    assert search([none])[0].tolist() == []


def test_the_longest_runs_are_looked_at_first(monkeypatch):
    """When not everything may be."""
    monkeypatch.setattr(misaligned, "MOST_BYTES", 40 * PAGE_SIZE)
    parts = [part(noise(n, n * PAGE_SIZE), 100 * n) for n in (20, 30, 17)]
    assert not misaligned._shorten(parts)
    assert [len(one.numbers) for one in parts] == [20, 30, 0]
    assert misaligned._shorten(parts[:1])
