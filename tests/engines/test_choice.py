"""Which engine: the fastest one that is safe for a process's memory."""

import errno
import os

import pytest

from sksm.engines import choice
from sksm.linux import ksm
from sksm.process import domain, guards, runtimes
from tests.conftest import NO_KSM

pytestmark = [pytest.mark.check, pytest.mark.pure]


@pytest.fixture
def world(monkeypatch):
    """Give `world(...)`: what there is, and what is said of the process."""

    def make(kernel=None, by_ksm=None, doubt=None, pins=None, never=None):
        """Reasons why not; None where nothing stands against it."""
        monkeypatch.setattr(choice, "missing", lambda _: kernel)
        monkeypatch.setattr(ksm, "untold", lambda: None)
        monkeypatch.setattr(ksm, "obstacle", lambda: by_ksm)
        monkeypatch.setattr(runtimes, "doubt", lambda _: doubt)
        monkeypatch.setattr(
            guards,
            "objection_to",
            lambda _, in_place=False: never or (None if in_place else pins),
        )
        monkeypatch.setattr(choice, "stranger", lambda *_: "")

    return make


NONE = "not in this kernel"


@pytest.mark.parametrize(
    ("there", "engine"),
    [
        ({}, "kernel"),
        ({"pins": "pinned", "doubt": "jemalloc"}, "kernel"),
        ({"kernel": NONE}, "pool"),
        ({"kernel": NONE, "doubt": "jemalloc"}, "ksm"),
        ({"kernel": NONE, "pins": "pinned"}, "ksm"),
        ({"kernel": NONE, "by_ksm": NO_KSM}, "pool"),
    ],
)
def test_auto_takes_the_first_that_is_safe(world, there, engine):
    """The kernel's own call, else the pool, else KSM."""
    world(**there)
    assert choice.choose(1) == (engine, "")


def test_where_none_is_safe_both_reasons_are_told(world):
    """Against the pool, and against KSM."""
    world(kernel=NONE, doubt="jemalloc is there", by_ksm=NO_KSM)
    engine, reason = choice.choose(1)
    assert engine == ""
    assert reason == f"jemalloc is there. By KSM it could be merged, but {NO_KSM}"


@pytest.mark.parametrize("wanted", ["auto", "pool", "ksm", "kernel"])
def test_what_nothing_can_merge_is_refused_by_all(world, wanted):
    """A process that ended, one that is traced."""
    world(never="it has ended")
    assert choice.choose(1, wanted) == ("", "it has ended")


def test_who_insists_gets_it_or_the_reason(world):
    """Doubt does not matter then, but what would break a program does."""
    world(kernel=NONE, by_ksm=NO_KSM, doubt="jemalloc")
    assert choice.choose(1, "pool") == ("pool", "")
    assert choice.choose(1, "ksm") == ("", NO_KSM)
    assert choice.choose(1, "kernel") == ("", NONE)
    world(kernel=NONE, pins="pinned")
    assert choice.choose(1, "pool") == ("", "pinned")
    assert choice.choose(1, "ksm") == ("ksm", "")


def test_ksm_is_not_chosen_where_it_would_share_with_another_user(monkeypatch):
    """Which pages merged is a secret between users; who insists knows that."""
    me = os.getpid()
    monkeypatch.setattr(ksm, "is_marked", lambda pid: pid == me)
    assert choice.stranger(domain.of(me).admits, "ksm") == ""
    crosses = choice.CROSSES.format(me, "ksm")
    assert choice.stranger(lambda pid: pid != me, "ksm") == crosses


def test_memory_that_its_owner_marked_goes_to_ksm_if_it_is_safe(world, monkeypatch):
    """As QEMU's guests: KSM takes no mapping for each run of pages."""
    world(kernel=NONE)
    assert choice.choose(1, marked=True) == ("ksm", "")
    world(kernel=NONE, by_ksm=NO_KSM)
    assert choice.choose(1, marked=True) == ("pool", "")
    world(kernel=NONE)
    monkeypatch.setattr(choice, "stranger", lambda *_: "somebody else")
    assert choice.choose(1, marked=True) == ("pool", "")
    world()
    assert choice.choose(1, marked=True) == ("kernel", "")


def test_the_kernels_call_crosses_no_users_either(world, monkeypatch):
    """It looks in KSM's trees, and so does whoever it would share with."""
    world()
    monkeypatch.setattr(choice, "stranger", lambda *_: "somebody else")
    assert choice.choose(1) == ("pool", "")
    assert choice.choose(1, "kernel") == ("kernel", "")


def test_the_kernels_call_is_for_those_who_are_told_what_it_did(world, monkeypatch):
    """Who is not root does not see which pages share a frame with others'."""
    world()
    monkeypatch.setattr(ksm, "untold", lambda: "secret")
    assert choice.choose(1) == ("pool", "")
    assert choice.choose(1, "kernel") == ("", "secret")


def test_a_process_that_ends_meanwhile_is_no_stranger(monkeypatch):
    """Its files are gone."""

    def gone(_):
        raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))

    monkeypatch.setattr(ksm, "is_marked", gone)
    assert choice.stranger(domain.of(os.getpid()).admits, "ksm") == ""
