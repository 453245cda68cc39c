"""SIGKILL of a client, and of the daemon, at every step: nobody else notices."""

import contextlib
import itertools
import os
import random
import signal

import numpy as np
import pytest

import sksm
from sksm.daemon import launch, protocol, server
from sksm.daemon.client import RemoteStore
from sksm.daemon.server import Server
from sksm.errors import DaemonUnreachable, SksmError
from sksm.linux import libc
from sksm.store import pool
from tests.conftest import Memory, daemon_pid, ended, poll
from tests.faults.scenes import PAGES, SCENES, Scene, gaps, second_copy
from tests.faults.seam import Seam
from tests.rows import content
from tests.support import start_child

SETTLED = ("merged", "zero", "stored", "already", "unique", "refused")


@pytest.fixture
def bystander(runtime, puppets):
    """A process whose pages are shared already, and must stay as they are."""
    puppet = puppets()
    puppet.fill("data", 1, PAGES)
    assert puppet.merge("data")["stored"] == PAGES
    return puppet


class StopAt:
    """A hook that stops the process at the call of that number, once."""

    def __init__(self, number):
        self._left = number

    def __call__(self, name):
        self._left -= 1
        if self._left == -1:
            os.kill(os.getpid(), signal.SIGSTOP)


def play(arrange, number):
    """Stop at a step of the scene; when it goes on, all bytes must be right.

    The next merge, with a new daemon if need be, must do all its work.
    """
    scene = Scene(arrange)
    seam = Seam(pytest.MonkeyPatch())
    seam.hook = StopAt(number)
    scene.play()
    seam.hook = lambda name: None
    assert scene.intact()
    again = sksm.merge(scene.target.rows)
    assert sum(getattr(again, name) for name in SETTLED) == again.scanned, again
    assert scene.intact()
    scene.end()


def steps(arrange):
    """Give a process stopped at the first step, one at the second, and so on."""
    for number in itertools.count():
        pid = start_child(lambda number=number: play(arrange, number))
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            assert number > 10, "hardly a step was met"
            assert status == 0, "see the traceback"
            return
        yield pid


def _is_as_before(status):
    return (status.slots, status.pool_bytes) == (PAGES, PAGES * 4096)


@pytest.mark.parametrize("arrange", SCENES, ids=lambda scene: scene.__name__)
def test_a_client_killed_at_any_step_leaves_nothing_behind(runtime, bystander, arrange):
    """Others keep their bytes; what it held is given back; the daemon goes on."""
    daemon = daemon_pid(runtime)
    store = RemoteStore(start=False)
    for pid in steps(arrange):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        # Who reads its /proc files just then keeps its memory alive for a moment.
        poll(lambda: _is_as_before(store.status(reclaim=True)))
    assert bystander.intact("data")
    assert daemon_pid(runtime) == daemon
    store.close()


@pytest.mark.parametrize(
    "arrange",
    [
        second_copy,
        gaps,
        *(
            pytest.param(scene, marks=pytest.mark.slow)
            for scene in SCENES
            if scene not in (second_copy, gaps)
        ),
    ],
    ids=lambda scene: scene.__name__,
)
def test_a_daemon_killed_at_any_step_of_a_client_harms_nobody(
    runtime, bystander, arrange
):
    """The merge goes on with a new daemon, or did not need one any more."""
    for pid in steps(arrange):
        daemon = daemon_pid(runtime)
        os.kill(daemon, signal.SIGKILL)
        poll(lambda daemon=daemon: ended(daemon))
        os.kill(pid, signal.SIGCONT)
        assert os.waitpid(pid, 0)[1] == 0, "see the traceback"
        assert bystander.intact("data")
        moved = bystander.merge("data")  # from the old pool into the new one
        assert moved.get("stored", 0) + moved.get("merged", 0) == PAGES, moved
        assert bystander.intact("data")
        assert daemon_pid(runtime) != daemon


def mortal_daemon(runtime, number):
    """Be a daemon that is killed at a certain one of its own steps."""
    left = itertools.count(number, -1)

    def dying(inner):
        def call(*args, **kwargs):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **kwargs)

        return call

    patch = pytest.MonkeyPatch()
    for where, name in (
        (libc, "process_vm_readv"),
        (libc, "fallocate"),
        (pool.os, "pwrite"),
        (pool.os, "ftruncate"),
        (protocol, "receive"),
        (server, "_send"),
    ):
        patch.setattr(where, name, dying(getattr(where, name)))
    with launch.runtime.lock():
        listener = launch.listen()
    Server(listener, 600.0, runtime / "sksmd.sock").run()


def use(number):
    """Merge with it twice, un-merge, have it reclaim; the end of it is no harm."""
    for _ in range(2):
        some = Memory(PAGES)
        some.rows[:] = content(number, PAGES)
        report = sksm.merge(some.rows)
        assert report.merged + report.stored == PAGES
        assert (some.rows == content(number, PAGES)).all()
        sksm.unmerge(some.rows)
        with contextlib.suppress(ConnectionError, DaemonUnreachable):
            store = RemoteStore(start=False)
            store.status(reclaim=True)
            store.close()
        assert (some.rows == content(number, PAGES)).all()


def test_a_daemon_killed_at_any_of_its_own_steps_harms_nobody(runtime):
    """While it reads pages, fills slots, gives them back, is asked, answers."""
    path = runtime / "sksmd.sock"
    for number in itertools.count():
        daemon = start_child(lambda number=number: mortal_daemon(runtime, number))
        poll(path.exists)
        assert os.waitpid(start_child(lambda number=number: use(number)), 0)[1] == 0
        alive = os.waitpid(daemon, os.WNOHANG) == (0, 0)
        if alive:
            os.kill(daemon, signal.SIGKILL)
            os.waitpid(daemon, 0)
            assert number > 10, "hardly a step was met"
            return
        if successor := daemon_pid(runtime):
            os.kill(successor, signal.SIGTERM)
            poll(lambda: not path.exists())
        path.unlink(missing_ok=True)


def merge_and_check(seed, told, go_on):
    """Merge, write, un-merge and compare, again and again, until told to end."""
    generator = random.Random(seed)
    kept = []
    for turn in itertools.count():
        rows = content(generator.randrange(4), PAGES)  # some of it is everybody's
        rows[generator.randrange(PAGES)] = content(seed * 1_000_000 + turn, 1)
        some = Memory(PAGES)
        some.rows[:] = rows
        with contextlib.suppress(SksmError):  # the daemon may die twice in a merge
            sksm.merge(some.rows)
        page = generator.randrange(PAGES)
        for copy in (some.rows, rows):
            copy[page, 9] ^= 0x55
        kept.append((some, rows))
        assert all(np.array_equal(one.rows, shadow) for one, shadow in kept)
        if len(kept) > 5:
            old, shadow = kept.pop(generator.randrange(len(kept)))
            sksm.unmerge(old.rows)
            assert np.array_equal(old.rows, shadow)
        os.write(told, b".")
        if not _wanted(go_on):
            return


def _wanted(go_on):
    """Say whether the other end of that pipe is still open."""
    try:
        return os.read(go_on, 1) != b""
    except BlockingIOError:
        return True


@pytest.mark.parametrize("kills", [15, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.limit(600)
def test_a_daemon_killed_again_and_again_harms_nobody(runtime, kills):
    """Several clients merge and compare all the time, and never see a wrong byte."""
    chance = random.Random(kills)
    progress, told = os.pipe()
    go_on, hold = os.pipe()
    os.set_blocking(go_on, False)

    def take_part(seed):
        os.close(hold)
        signal.alarm(500)
        merge_and_check(seed, told, go_on)

    pids = [start_child(lambda seed=seed: take_part(seed)) for seed in (1, 2, 3)]
    for _ in range(kills):
        assert os.read(progress, chance.randrange(1, 9)), "all clients are gone"
        with contextlib.suppress(ConnectionError, DaemonUnreachable):
            if daemon := daemon_pid(runtime):
                os.kill(daemon, signal.SIGKILL)
    os.close(hold)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    for fd in (progress, told, go_on):
        os.close(fd)


def test_memory_of_a_dead_daemons_pool_is_merged_into_the_next_one(runtime, puppets):
    """What was shared stays right, and is shared anew with whoever comes later."""
    mine = Memory(PAGES)
    mine.rows[:] = content(1, PAGES)
    sksm.merge(mine.rows)
    os.kill(daemon_pid(runtime), signal.SIGKILL)
    other = puppets()
    other.fill("data", 1, PAGES)
    assert other.merge("data")["stored"] == PAGES  # into the new pool

    assert sksm.merge(mine.rows).merged == PAGES

    assert (mine.rows == content(1, PAGES)).all()
    other.end()
    sksm.unmerge(mine.rows)
