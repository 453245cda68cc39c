"""Pages that change between looks."""

import numpy as np
import pytest

from sksm.estimate import Estimate
from sksm.hotness import Watch, keep_looking
from sksm.process import pages_of, spans_of
from sksm.spans import PAGE_SIZE, Span
from tests.process.holder import Holder


@pytest.fixture
def watched(puppets):
    """Two processes that hold the same, under watch."""
    holders = [Holder(puppets, [1, 2, 3, 0, 4]) for _ in range(2)]
    estimate = Estimate()
    spaces = [one.window() for one in holders]
    for space in spaces:
        estimate.add(space)
    yield holders, estimate, Watch(estimate, spaces)
    for space in spaces:
        space.__exit__()


def hot(watch, holder):
    return np.flatnonzero(watch.hot[holder.pid]).tolist()


def test_what_changed_at_any_look_is_hot(watched):
    """Also if it is as before at the last."""
    (one, two), _, watch = watched
    watch.look()
    assert hot(watch, one) == hot(watch, two) == []
    one.ask("put", 1, 9)
    watch.look()
    one.ask("put", 1, 2)
    watch.look()
    assert (hot(watch, one), hot(watch, two)) == ([1], [])


def test_hot_pages_equal_no_other_but_fill_gaps(watched):
    """A mapping goes on across them; the twin they had is alone."""
    (one, two), estimate, watch = watched
    assert estimate.total().duplicate_bytes == 4 * PAGE_SIZE
    one.ask("put", 1, 9)
    one.ask("put", 3, 9)
    one.ask("put", 4, 9)
    watch.look()
    cold = watch.cold()
    assert cold.total().duplicate_bytes == 2 * PAGE_SIZE
    assert cold.total().zero_bytes == PAGE_SIZE
    assert cold.total().looked_bytes == estimate.total().looked_bytes
    assert cold.twins(one.pid) == [Span(one.page(0), one.page(3))]
    assert cold.twins(two.pid) == [Span(two.page(0), two.page(4))]


def test_pages_that_are_gone_are_hot(watched):
    """Whoever drops memory does not need it merged."""
    (one, _), _, watch = watched
    one.ask("drop")
    watch.look()
    assert hot(watch, one) == [0, 1, 2, 3, 4]


def test_process_that_ended_is_left_out(watched):
    """Its pages are nobody's twins any more."""
    (one, two), estimate, watch = watched
    two.process.end()
    watch.look()
    assert list(watch.hot) == list(estimate.holdings) == [one.pid]
    assert watch.cold().total().duplicate_bytes == 0
    watch.look()
    assert watch.looks == 2


def test_it_looks_at_the_end_at_least(watched):
    """However short the time, and tells it all."""
    _, _, watch = watched
    told = []
    keep_looking([watch], 0.05, told.append)
    assert watch.looks >= 1
    assert sum(told) >= 0.05 - 1e-6


def test_spans_cover_pages_once():
    """The fewest, in order."""
    numbers = np.array([3, 4, 5, 9, 11, 12])
    spans = spans_of(numbers)
    assert len(spans) == 3
    assert pages_of(spans).tolist() == numbers.tolist()
    assert spans_of(numbers[:0]) == []
