"""A process that has copied much of what it shares keeps no more than it shows."""

import contextlib

import pytest

from sksm.daemon.client import RemoteStore
from sksm.linux.features import Feature
from sksm.process.other import OtherProcess
from sksm.regranting import regrant

pytestmark = [
    pytest.mark.needs(
        Feature.PTRACE_SEIZE, Feature.USERFAULTFD_WP, Feature.PIDFD_GETFD
    ),
    pytest.mark.usefixtures("runtime", "unhurried"),
]

PAGES = 1024


@pytest.fixture
def store(runtime):
    with contextlib.closing(RemoteStore()) as one:
        yield one


def test_slots_of_pages_that_were_copied_are_freed(store, puppets):
    """And those of the others kept; not a byte changes, for it or for a sharer."""
    one, two = puppets(), puppets()
    one.fill("data", 1, PAGES)
    two.fill("data", 1, PAGES // 2)
    for each in (one, two):
        each.merge("data")
        each.hang_up()
    one.write("data", 100, PAGES - 100)
    assert store.status(reclaim=True).slots == PAGES

    with OtherProcess(one.pid) as space:
        assert regrant(space, store) == PAGES - 200

    store.let_go()
    kept = store.status(reclaim=True)
    assert kept.slots == PAGES // 2 + 100  # the other's, and its own last ones
    assert kept.pool_bytes == kept.slots * 4096
    assert one.intact("data")
    assert two.intact("data")
    one.write("data", 0, PAGES)
    assert one.intact("data")
    two.end()
    one.end()
    assert store.status(reclaim=True).slots == 0


def test_a_process_that_has_copied_little_is_left_alone(store, puppets):
    """It is not worth the stop."""
    one = puppets()
    one.fill("data", 1, PAGES)
    one.merge("data")
    one.hang_up()
    one.write("data", 0, 20)
    grants = store.status(reclaim=True).grants
    with OtherProcess(one.pid) as space:
        assert regrant(space, store) == 0
        assert space.stops == []
    assert store.status(reclaim=True).grants == grants
    assert one.intact("data")
