"""A slot stays while any grant that was given it lives, and is free then."""

import contextlib
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksm.store.grants import Grants
from sksm.store.local import LocalStore
from tests.rows import Memory, content

PAGES = 12


@pytest.fixture
def store():
    with contextlib.closing(LocalStore()) as one:
        yield one


def offered(store, seed, pages=PAGES):
    some = Memory(pages)
    some.rows[:] = content(seed, pages)
    return store.offer(os.getpid(), [some.span])[0]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("new")),
        st.tuples(st.just("answer"), st.integers(0, 5), st.integers(0, 3)),
        st.tuples(st.just("settle"), st.integers(0, 5), st.integers(0, PAGES)),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("sweep")),
    ),
    max_size=30,
)


@given(STEPS)
def test_slots_are_free_exactly_when_no_grant_has_them(steps):
    """In whatever order grants come, are given slots, tell what they map, and end."""
    with contextlib.closing(LocalStore()) as store:
        grants, held = Grants(store), []  # grant, descriptor, kept, answered
        for step, *args in steps:
            if step == "new":
                held.append((*grants.new(), set(), set()))
            elif step == "sweep":
                grants.sweep()
                alive = set().union(*(kept | told for *_, kept, told in held))
                assert set(store.used().tolist()) == alive
            elif held:
                grant, fd, kept, told = held[args[0] % len(held)]
                if step == "answer":
                    slots = offered(store, args[1])
                    grants.add(grant, slots)
                    told |= set(slots.tolist())
                elif step == "settle":
                    mapped = sorted(told)[: args[1]]
                    runs = np.array([[slot, slot + 1] for slot in mapped], np.int64)
                    grants.settle(grant, runs.reshape(-1, 2))
                    kept |= set(mapped)
                    told.clear()
                else:
                    os.close(fd)
                    held = [one for one in held if one[0] is not grant]
        for _, fd, *_ in held:
            os.close(fd)
        grants.sweep()
        assert (len(store.used()), len(grants)) == (0, 0)
        assert store.pool_bytes() == 0


def test_what_its_holder_says_of_a_grant_that_has_ended_changes_nothing(store):
    """The word may come after the descriptor was closed, and the slots used again."""
    grants = Grants(store)
    ended, fd = grants.new()
    slots = offered(store, 1)
    grants.add(ended, slots)
    os.close(fd)
    assert grants.sweep() == PAGES
    living, fd = grants.new()
    grants.add(living, again := offered(store, 2))
    assert again.tolist() == slots.tolist()
    grants.settle(ended, np.empty((0, 2), np.int64))
    assert grants.sweep() == 0
    assert store.used().tolist() == again.tolist()
    os.close(fd)
    assert grants.sweep() == PAGES
    assert not grants.knows(living)


def test_a_slot_that_is_used_again_is_found_by_its_new_page_only(store):
    """Its place in the index led to another page before."""
    grants = Grants(store)
    for seed in range(300):  # ever the same slots
        grant, fd = grants.new()
        slots = offered(store, seed)
        grants.add(grant, slots)
        assert slots.tolist() == list(range(PAGES))
        if seed:
            again = offered(store, seed - 1)
            assert not set(again.tolist()) & set(slots.tolist())
            grants.add(grant, again)
        os.close(fd)
        grants.sweep()
        assert len(store.used()) == 0
