"""Several offers under way at once."""

import contextlib
import os

import numpy as np
import pytest

from sksm.daemon.client import RemoteStore
from sksm.spans import PAGE_SIZE, Span, groups


@pytest.fixture
def store(runtime):
    with contextlib.closing(RemoteStore()) as one, one.granted():
        yield one


def test_answers_come_in_the_order_of_the_offers(store, memory, different):
    """Each with the slots of its own pages, new ones in a straight run."""
    some = memory(12)
    some.rows[:] = different(12)

    parts = list(groups([some.span], 4))
    answers = list(store.offers(os.getpid(), parts))

    assert [len(slots) for slots, _, _ in answers] == [4, 4, 4]
    slots = np.concatenate([slots for slots, _, _ in answers])
    assert (np.diff(slots) == 1).all()
    with open(f"/proc/self/fd/{store.pool}", "rb") as pool:
        pool.seek(int(slots[0]) * PAGE_SIZE)
        assert pool.read(some.span.size) == some.rows.tobytes()


def test_answers_that_nobody_wants_do_not_meet_the_next_question(
    store, memory, different
):
    """A merge that fails between two answers leaves a clean connection."""
    some = memory(12)
    some.rows[:] = different(12)

    answers = store.offers(os.getpid(), list(groups([some.span], 4)))
    next(answers)
    answers.close()

    assert (store.lookup(np.zeros(3, np.uint64)) == -1).all()
    slots, fresh, refusal = store.offer(os.getpid(), [some.span])
    assert (len(set(slots.tolist())), fresh.any(), refusal) == (12, False, "")


def test_groups_cut_spans_into_equal_parts():
    """Across the spans given, in order, the rest last."""
    spans = [Span(0, 3 * PAGE_SIZE), Span(8 * PAGE_SIZE, 12 * PAGE_SIZE)]
    parts = list(groups(spans, 2))
    assert [sum(span.pages for span in part) for part in parts] == [2, 2, 2, 1]
    assert parts[1] == [
        Span(2 * PAGE_SIZE, 3 * PAGE_SIZE),
        Span(8 * PAGE_SIZE, 9 * PAGE_SIZE),
    ]
