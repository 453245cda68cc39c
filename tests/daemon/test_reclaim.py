"""What nobody maps any more is given back, and nothing else."""

import contextlib
import ctypes
import os

import numpy as np
import pytest

import sksm
from sksm.daemon.client import RemoteStore
from sksm.linux import libc
from sksm.pages import BATCH_PAGES
from sksm.spans import PAGE_SIZE, Span
from tests.conftest import Memory
from tests.rows import content

PAGES = 64


@pytest.fixture
def pair(daemon, puppets):
    """Two processes that share the same pages, none of them its own any more."""
    one, other = puppets(), puppets()
    for puppet in (one, other):
        puppet.fill("data", 1, PAGES)
        puppet.merge("data")
    assert daemon.status(reclaim=True).slots == PAGES
    return one, other


def leave_by_unmerging(puppet):
    puppet.unmerge("data")


def leave_by_exiting(puppet):
    puppet.end()


@pytest.mark.parametrize("leave", [leave_by_unmerging, leave_by_exiting])
def test_pages_that_everybody_left_are_given_back(daemon, pair, leave):
    """Un-merged or gone with its process: the memory is free again."""
    for puppet in pair:
        leave(puppet)

    status = daemon.status(reclaim=True)

    assert (status.slots, status.reclaimed, status.grants) == (0, PAGES, 0)
    assert status.pool_bytes == 0


@pytest.mark.parametrize("leave", [leave_by_unmerging, leave_by_exiting])
def test_pages_that_one_process_left_stay_for_the_other(daemon, pair, leave):
    """One mapping anywhere keeps a slot."""
    leave(pair[0])

    assert daemon.status(reclaim=True).slots == PAGES
    assert pair[1].intact("data")


def test_pages_that_everybody_wrote_stay_as_long_as_a_mapping_covers_them(daemon, pair):
    """A page of it that is dropped would show what its slot holds."""
    for puppet in pair:
        puppet.write("data", 0, PAGES)
    assert daemon.status(reclaim=True).slots == PAGES
    for puppet in pair:
        assert puppet.intact("data")
        puppet.unmerge("data")
    assert daemon.status(reclaim=True).slots == 0


@pytest.mark.check
def test_a_forked_child_keeps_its_parents_slots(daemon, puppets):
    """A child maps what its parent mapped, and outlives it."""
    parent = puppets()
    parent.fill("data", 1, PAGES)
    parent.merge("data")
    child = parent.fork()
    parent.unmerge("data")

    assert daemon.status(reclaim=True).slots == PAGES
    parent.end_child(child)
    assert daemon.status(reclaim=True).slots == 0
    assert parent.intact("data")


@pytest.mark.parametrize("deed", ["drop", "move"])
def test_slots_are_kept_for_ranges_whose_page_table_was_changed(daemon, pair, deed):
    """An absent entry is live, since the next read brings the pool's page back.

    So is a mapping that mremap took elsewhere in two pieces.
    """
    pair[0].end()
    getattr(pair[1], deed)("data")

    assert daemon.status(reclaim=True).slots == PAGES
    assert pair[1].intact("data")
    assert daemon.status(reclaim=True).slots == PAGES


def test_slots_are_kept_for_memory_that_may_not_be_read_now(daemon, pair):
    """PROT_NONE hides pages from their process, not from reclaim's sight."""
    pair[0].end()
    pair[1].protect("data", libc.PROT_NONE)

    assert daemon.status(reclaim=True).slots == PAGES
    pair[1].protect("data", libc.PROT_READ | libc.PROT_WRITE)
    assert pair[1].intact("data")


@pytest.mark.check
def test_a_slot_given_back_and_used_again_holds_the_right_bytes(daemon, puppets):
    """Whoever gets the slot next reads his own bytes, and so does everybody else."""
    stays, goes, comes = puppets(), puppets(), puppets()
    for seed, puppet in ((1, stays), (2, goes)):
        puppet.fill("data", seed, PAGES)
        puppet.merge("data")
    goes.end()
    assert daemon.status(reclaim=True).slots == PAGES
    for seed in (3, 1, 2):
        comes.fill(seed, seed, PAGES)
        comes.merge(seed)
        assert comes.intact(seed)

    status = daemon.status(reclaim=True)

    assert status.slots == 3 * PAGES
    assert status.pool_bytes == 3 * PAGES * PAGE_SIZE
    assert stays.intact("data")


def test_memory_is_never_merged_with_a_slot_that_was_given_back(daemon, puppets):
    """A free slot reads as zeros, but it is no page of zeros to share.

    The next pages offered go into free slots. Who had mapped one, because his
    zeros equalled it, would see his memory change.
    """
    batch = BATCH_PAGES
    keeps, goes, guesses, comes = (puppets() for _ in range(4))
    keeps.fill("head", 1, batch)
    keeps.merge("head")
    goes.fill("tail", 2, batch)
    goes.merge("tail")
    goes.end()
    assert daemon.status(reclaim=True).slots == batch
    rows = content(1, 2 * batch)
    rows[:batch] = content(1, batch)
    rows[batch:] = 0
    guesses.put("both", rows)

    guesses.merge("both")
    comes.fill("new", 3, batch)
    comes.merge("new")

    assert guesses.intact("both")
    assert comes.intact("new")


def test_a_slot_that_a_client_was_told_of_stays_until_that_is_gone(
    daemon, pair, puppets
):
    """It may be mapped in the next moment; others are freed meanwhile."""
    busy, others = puppets(), puppets()
    busy.fill("data", 1, PAGES)
    busy.ask_for("data")
    for puppet in pair:
        puppet.end()
    others.fill("other", 2, PAGES)
    others.merge("other")
    others.end()

    status = daemon.status(reclaim=True)
    assert (status.slots, status.reclaimed) == (PAGES, PAGES)

    busy.end()  # killed in the middle: its grant ends with it
    assert daemon.status(reclaim=True).slots == 0


def test_what_a_client_was_told_of_and_has_not_mapped_is_freed(daemon, puppets):
    """Pages that equal a slot by chance of a hash, say, or could not be replaced."""
    stays = puppets()
    stays.fill("data", 1, PAGES)
    stays.merge("data")
    some = Memory(PAGES)
    some.rows[:] = content(2, PAGES)
    with contextlib.closing(RemoteStore(start=False)) as store:
        with store.granted():
            slots, _, _ = store.offer(os.getpid(), [some.span])
            store.mapped(int(slots[0]), 16)
        assert daemon.status(reclaim=True).slots == PAGES + 16
    assert daemon.status(reclaim=True).slots == PAGES


@pytest.mark.check
@pytest.mark.parametrize("told", [16, 17, 5000], ids=["all", "more", "in-pieces"])
def test_what_one_merge_has_mapped_stays_when_the_next_maps_less(daemon, told):
    """Small merges share a grant; what was told of the first holds for it only."""
    rows = content(1, 32)
    store = RemoteStore(start=False)
    with contextlib.closing(store):
        some = Memory(32)
        some.rows[:] = rows
        first, second = some.span.start, some.span.start + 16 * PAGE_SIZE
        with store.granted():
            slots, _, _ = store.offer(os.getpid(), [Span(first, second)])
            start = int(slots[0]) * PAGE_SIZE
            at = libc.mmap(None, 16 * PAGE_SIZE, 1, 2, store.pool, start)
            if told == 5000:
                for _ in range(5000):
                    store.mapped(int(slots[0]), 1)
            else:
                store.mapped(int(slots[0]), told)
        with store.granted():
            slots, _, _ = store.offer(os.getpid(), [Span(second, some.span.stop)])
            store.mapped(int(slots[0]), 4)
        assert daemon.status(reclaim=True).slots == 20
        other = Memory(32)
        other.rows[:] = content(2, 32)
        sksm.merge(other.rows)
        assert ctypes.string_at(at, 16 * PAGE_SIZE) == rows[:16].tobytes()
        libc.munmap(at, 16 * PAGE_SIZE)


def test_of_a_merge_that_broke_off_every_slot_stays(daemon):
    """Nobody knows what was mapped, or may be yet by a thread that was given up."""
    some = Memory(16)
    some.rows[:] = content(1, 16)
    store = RemoteStore(start=False)
    with contextlib.closing(store):
        with contextlib.suppress(KeyError), store.granted():
            slots, _, _ = store.offer(os.getpid(), [some.span])
            start = int(slots[0]) * PAGE_SIZE
            at = libc.mmap(None, PAGE_SIZE, 1, 2, store.pool, start)
            raise KeyError
        with store.granted():
            store.lookup(np.zeros(3, np.uint64))
        assert daemon.status(reclaim=True).slots == 16
    libc.munmap(at, PAGE_SIZE)
    assert daemon.status(reclaim=True).slots == 0


def test_behind_a_slot_that_stands_alone_there_is_nothing_to_claim(daemon):
    """A range may end with such a page; the merge goes on."""
    alone = Memory(1)
    alone.rows[:] = content(1, 1)
    store = RemoteStore(start=False)
    with contextlib.closing(store), store.granted():
        (slot,), _, _ = store.offer(os.getpid(), [alone.span], alone=True)
        assert not store.claim(int(slot) + 1, 4)
        store.in_doubt()
        pages = 2 * BATCH_PAGES
        some = Memory(pages)
        some.rows[:] = content(2, pages)
        edge = -some.span.start // PAGE_SIZE % BATCH_PAGES - 1  # where a batch ends
        some.rows[edge] = alone.rows[0]
        report = sksm.merge(some.rows)
        assert (report.merged, report.stored) == (1, pages - 1)


def test_a_slot_that_stands_alone_is_given_back_when_nobody_maps_it(daemon):
    """Not before: what was mapped from it may have grown behind it."""
    some = Memory(1)
    some.rows[:] = content(1, 1)
    store = RemoteStore(start=False)
    with contextlib.closing(store), store.granted():
        (slot,), _, _ = store.offer(os.getpid(), [some.span], alone=True)
        where = (libc.PROT_READ | libc.PROT_WRITE, libc.MAP_PRIVATE, store.pool)
        at = libc.mmap(None, 4 * PAGE_SIZE, *where, int(slot) * PAGE_SIZE)
        store.mapped(int(slot), 1)
    assert daemon.status(reclaim=True).slots == 1
    libc.munmap(at, PAGE_SIZE)
    assert daemon.status(reclaim=True).slots == 1
    libc.munmap(at + PAGE_SIZE, 3 * PAGE_SIZE)
    assert daemon.status(reclaim=True).slots == 0
