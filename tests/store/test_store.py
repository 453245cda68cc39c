"""A store in this process: what it takes, what it refuses, what it gives back."""

import contextlib
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

from sksm.fingerprints import fingerprint
from sksm.spans import PAGE_SIZE, Span
from sksm.store import UNSEEN, alone
from sksm.store.alone import APART
from sksm.store.local import FULL, NO_MORE_ALONE, LocalStore

pytestmark = pytest.mark.check


@pytest.fixture
def store():
    with contextlib.closing(LocalStore()) as store:
        yield store


def content(store, slot):
    return os.pread(store.pool, PAGE_SIZE, int(slot) * PAGE_SIZE)


def test_offered_pages_are_in_the_pool_and_found_by_their_prints(
    store, memory, different
):
    """A slot holds the page's bytes, and its fingerprint leads there."""
    some = memory(5)
    some.rows[:] = different(5)

    slots, fresh, refusal = store.offer(os.getpid(), [some.span])

    assert (fresh.tolist(), refusal) == ([True] * 5, "")
    assert [content(store, slot) for slot in slots] == [bytes(r) for r in some.rows]
    assert (store.lookup(fingerprint(some.rows, store.seed)) == slots).all()
    assert store.used().tolist() == sorted(slots.tolist())


def test_pages_come_in_the_order_of_the_spans(store, memory, different):
    """Several spans, out of order: slots answer page by page."""
    some = memory(4)
    some.rows[:] = different(4)
    start = some.address
    spans = [
        Span(start + first * PAGE_SIZE, start + stop * PAGE_SIZE)
        for first, stop in ((2, 4), (0, 1))
    ]
    slots, _, _ = store.offer(os.getpid(), spans)
    assert [content(store, s) for s in slots] == [
        bytes(some.rows[i]) for i in (2, 3, 0)
    ]


def test_equal_pages_of_one_offer_take_one_slot(store, memory, different):
    """Of duplicates one is new, and the others are merged with it."""
    some = memory(6)
    some.rows[:] = different(2)[[0, 1, 0, 0, 1, 0]]

    slots, fresh, _ = store.offer(os.getpid(), [some.span])

    assert slots.tolist() == [
        slots[0],
        slots[1],
        slots[0],
        slots[0],
        slots[1],
        slots[0],
    ]
    assert fresh.tolist() == [True, True, False, False, False, False]
    assert store.usage()["slots"] == 2


def test_known_pages_are_not_stored_again(store, memory, different):
    """An offer of what is there already costs no memory."""
    some = memory(3)
    some.rows[:] = different(3)
    first, _, _ = store.offer(os.getpid(), [some.span])
    before = store.usage()

    again, fresh, _ = store.offer(os.getpid(), [some.span])

    assert (again == first).all()
    assert not fresh.any()
    assert store.usage() == before


def test_zero_pages_are_not_stored(store, memory, different):
    """The kernel has a page of zeros of its own."""
    some = memory(3)
    some.rows[1] = different(1)

    slots, fresh, refusal = store.offer(os.getpid(), [some.span])

    assert slots[[0, 2]].tolist() == [UNSEEN, UNSEEN]
    assert (fresh.tolist(), refusal) == ([False, True, False], "")
    assert store.usage()["slots"] == 1


def test_memory_that_is_gone_is_refused_with_the_reason(store):
    """Nothing is mapped at the second page: an outcome, not an error."""
    slots, fresh, refusal = store.offer(os.getpid(), [Span(0, PAGE_SIZE)])
    assert slots.tolist() == [UNSEEN]
    assert not fresh.any()
    assert "unmapped meanwhile" in refusal


def test_a_process_that_is_gone_is_refused_with_the_reason(store):
    """Its pid belongs to nobody any more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    _, _, refusal = store.offer(process.pid, [Span(PAGE_SIZE, 2 * PAGE_SIZE)])
    assert "unmapped meanwhile" in refusal


def test_a_process_that_may_not_be_read_is_refused_with_the_reason(store, monkeypatch):
    """Under Yama, or when it is not dumpable, the kernel says EPERM."""

    def forbid(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("sksm.store.local.read_pages", forbid)
    _, _, refusal = store.offer(1, [Span(0, PAGE_SIZE)])
    assert "may not read" in refusal


@pytest.mark.parametrize("code", [12, 28, 27, 122], ids=os.strerror)
def test_a_pool_without_memory_refuses_and_forgets_nothing(
    store, memory, different, monkeypatch, code
):
    """What was known stays known; the rest is refused and may come again."""
    some = memory(4)
    some.rows[:] = different(4)
    known = Span(some.address, some.address + 2 * PAGE_SIZE)
    first, _, _ = store.offer(os.getpid(), [known])

    def lack(rows):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(store._pool, "put", lack)
        slots, fresh, refusal = store.offer(os.getpid(), [some.span])

    assert slots.tolist() == [*first.tolist(), UNSEEN, UNSEEN]
    assert not fresh.any()
    assert refusal.startswith(FULL)
    slots, fresh, refusal = store.offer(os.getpid(), [some.span])
    assert (fresh.tolist(), refusal) == ([False, False, True, True], "")


def test_a_forked_child_never_writes_to_the_pool(store, memory, different):
    """Two writers would give one slot to two pages."""
    some = memory(2)
    some.rows[:] = different(2)
    pid = os.fork()
    if pid == 0:
        slots, _, refusal = store.offer(os.getpid(), [some.span])
        os._exit(0 if (slots == UNSEEN).all() and "parent" in refusal else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert store.usage()["pool_bytes"] == 0


def test_dropped_slots_are_forgotten_and_used_again(store, memory, different):
    """A page that comes back after it was dropped is new again."""
    some = memory(4)
    some.rows[:] = different(4)
    slots, _, _ = store.offer(os.getpid(), [some.span])

    store.drop(slots[1:3])

    found = store.lookup(fingerprint(some.rows, store.seed))
    assert (found == UNSEEN).tolist() == [False, True, True, False]
    again, fresh, _ = store.offer(os.getpid(), [some.span])
    assert fresh.tolist() == [False, True, True, False]
    assert sorted(again.tolist()) == sorted(slots.tolist())
    assert [content(store, slot) for slot in again] == [bytes(r) for r in some.rows]


def test_stores_have_secrets_of_their_own(store):
    """Fingerprints of one store mean nothing to another."""
    with contextlib.closing(LocalStore()) as other:
        assert store.seed != other.seed


def test_offers_of_nothing_are_answered(store):
    """No pages, no slots, no memory."""
    slots, fresh, refusal = store.offer(os.getpid(), [])
    assert (len(slots), len(fresh), refusal) == (0, 0, "")
    store.drop(np.empty(0, np.int64))


# -- slots that stand alone


def offer_alone(store, some):
    return store.offer(os.getpid(), [some.span], alone=True)


def test_behind_a_slot_that_stands_alone_there_is_nothing(store, memory, different):
    """For as long as addresses reach; and its page is found as any other."""
    some = memory(3)
    some.rows[:2] = different(2)

    slots, fresh, refusal = offer_alone(store, some)

    assert (fresh.tolist(), refusal) == ([True, True, False], "")
    assert slots.tolist() == [APART, 2 * APART, UNSEEN]  # zeros need none
    for slot, row in zip(slots[:2], some.rows, strict=False):
        assert content(store, slot) == bytes(row)
        assert content(store, slot + 1) == content(store, slot + APART - 1)
        assert content(store, slot + 1) == bytes(PAGE_SIZE)
    assert store.lookup(fingerprint(some.rows, store.seed)).tolist() == slots.tolist()
    assert store.used().tolist() == slots[:2].tolist()
    assert store.usage()["slots"] == 2
    again, fresh, _ = offer_alone(store, some)
    assert (again.tolist(), fresh.any()) == (slots.tolist(), False)


def test_pages_that_have_a_slot_get_another_one_that_stands_alone(
    store, memory, different
):
    """Among others they are found where they were first."""
    some = memory(2)
    some.rows[:] = different(2)
    ordinary, _, _ = store.offer(os.getpid(), [some.span])
    alone, _, _ = offer_alone(store, some)
    assert (alone >= APART).all()
    found = store.lookup(fingerprint(some.rows, store.seed))
    assert found.tolist() == ordinary.tolist()


def test_slots_that_stand_alone_are_given_back_and_used_again(store, memory, different):
    """With what somebody read behind them."""
    some = memory(2)
    some.rows[:] = different(2)
    slots, _, _ = offer_alone(store, some)
    with mmap.mmap(store.pool, PAGE_SIZE * 2, offset=APART * PAGE_SIZE) as view:
        assert view[PAGE_SIZE] == 0  # which takes a page of the file
    assert store.usage()["pool_bytes"] == 3 * PAGE_SIZE

    store.drop(slots[:1])

    assert store.usage()["pool_bytes"] == PAGE_SIZE
    assert store.lookup(fingerprint(some.rows, store.seed))[0] == UNSEEN
    some.rows[0] = different(1)[0]
    again, fresh, _ = offer_alone(store, some)
    assert (again.tolist(), fresh.tolist()) == (slots.tolist(), [True, False])
    assert content(store, APART) == bytes(some.rows[0])


def test_more_single_pages_than_there_is_room_for_are_refused(
    store, memory, different, monkeypatch
):
    """The file ends somewhere. What there is serves on."""
    monkeypatch.setattr(alone, "_MOST", 2)
    some = memory(3)
    some.rows[:] = different(3)
    slots, _, refusal = offer_alone(store, some)
    assert (slots.tolist(), refusal) == ([APART, 2 * APART, UNSEEN], NO_MORE_ALONE)


def test_the_last_slot_that_stands_alone_is_within_a_file(store, memory, different):
    """Whose size is a signed number of 64 bits."""
    some = memory(1)
    some.rows[:] = different(1)
    store._alone._next = alone._MOST * APART
    slots, fresh, _ = offer_alone(store, some)
    assert (slots.tolist(), fresh.all()) == ([alone._MOST * APART], True)
    assert content(store, slots[0]) == bytes(some.rows[0])
    store.drop(slots)
    assert store.usage()["pool_bytes"] == 0
