"""The daemon goes when nobody uses it, and only then."""

import os
import shutil
import signal

import pytest

import sksm
from sksm import session
from sksm.daemon import launch, protocol
from sksm.daemon.client import RemoteStore
from sksm.daemon.server import Server
from sksm.errors import DaemonUnreachable
from tests.conftest import Memory, daemon_pid, poll
from tests.rows import content
from tests.support import Raw, mapped_bytes, start_child

PAGES = 16


def test_daemon_leaves_with_socket_and_memory_when_nobody_uses_it(
    runtime, daemons, puppets
):
    """No client, no live slot: it ends, and the kernel frees the memfd."""
    daemon, puppet = daemons(idle=0.05), puppets()
    puppet.fill("data", 1, PAGES)
    puppet.merge("data")
    inode = puppet.pool_inode()
    assert mapped_bytes(inode) == PAGES * 4096
    daemon.let_go()
    puppet.end()

    assert daemon.process.wait(30) == 0
    assert sorted(os.listdir(runtime)) == ["lock"]
    assert mapped_bytes(inode) == 0


def test_daemon_stays_while_somebody_maps_the_pool(daemons, puppets):
    """A client may hang up and keep what it merged: others merge with it."""
    daemon, puppet = daemons(idle=0.01), puppets()
    puppet.fill("data", 1, PAGES)
    puppet.merge("data")
    daemon.let_go()
    asleep = daemon.switches()
    puppet.hang_up()
    poll(lambda: daemon.switches() > asleep + 1)  # it has looked, ever more rarely

    assert daemon.process.poll() is None
    puppet.fill("again", 1, PAGES)
    assert puppet.merge("again")["merged"] == PAGES
    puppet.end()
    assert daemon.process.wait(30) == 0


def test_a_daemon_that_was_started_by_a_client_leaves_too(runtime, monkeypatch):
    """Nobody has to end it."""
    monkeypatch.setenv("SKSM_IDLE_SECONDS", "0.05")
    some = Memory(PAGES)
    some.rows[:] = content(1, PAGES)
    sksm.merge(some.rows)
    assert (runtime / "sksmd.sock").exists()

    sksm.unmerge(some.rows)
    session.current.close()

    poll(lambda: not (runtime / "sksmd.sock").exists())
    assert (some.rows == content(1, PAGES)).all()


def test_sigterm_ends_it_cleanly(runtime, daemon):
    """Socket removed, lock free, merged memory right, and the next merge works."""
    some = Memory(PAGES)
    some.rows[:] = content(1, PAGES)
    sksm.merge(some.rows)
    daemon.process.send_signal(signal.SIGTERM)

    assert daemon.process.wait(30) == 0
    assert os.listdir(runtime) == ["lock"]
    with launch.runtime.lock(wait=False):
        pass
    assert (some.rows == content(1, PAGES)).all()
    assert sksm.merge(some.rows).stored == PAGES  # into a new daemon's pool
    assert daemon_pid(runtime) not in (None, daemon.pid)
    assert (some.rows == content(1, PAGES)).all()


def test_a_client_with_blocked_signals_does_not_make_it_deaf(runtime):
    """It does not inherit the signal mask of the thread that came first."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        sksm.merge(Memory(PAGES).rows)
        RemoteStore(start=False).close()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    pid = daemon_pid(runtime)
    os.kill(pid, signal.SIGTERM)
    poll(lambda: not (runtime / "sksmd.sock").exists())


def test_its_end_is_clean_when_its_directory_is_gone(runtime, daemons):
    """Somebody cleaned up /tmp: nobody can find it any more, and it leaves."""
    daemon = daemons(idle=0.05)
    shutil.rmtree(runtime)
    daemon.let_go()

    assert daemon.process.wait(30) == 0


class Here:
    """A daemon in this process, so that a test can act between two of its steps."""

    def __init__(self, directory):
        self.listener = launch.listen()
        self.listener.setblocking(False)
        self.server = Server(self.listener, 0.0, directory / "sksmd.sock")

    def close(self):
        self.server._close()


@pytest.fixture
def here(runtime):
    one = Here(runtime)
    yield one
    one.close()


def test_a_client_at_the_door_keeps_it_from_leaving(runtime, here):
    """It connected before the socket went out of sight: it is let in."""
    with Raw(runtime) as client:
        client.say(protocol.Hello(protocol.VERSION))

        assert not here.server._may_leave()
        assert (runtime / "sksmd.sock").exists()
        here.server._answer(next(iter(here.server._clients)))
        assert client.hear().pid == os.getpid()


def test_a_client_that_comes_while_it_looks_at_the_door_is_let_in(
    runtime, here, monkeypatch
):
    """The last moment to connect is the one before the socket is hidden."""
    client = []
    hide = here.server._door.hide

    def hide_late():
        client.append(Raw(runtime))
        hide()

    monkeypatch.setattr(here.server._door, "hide", hide_late)

    assert not here.server._may_leave()
    assert len(here.server._clients) == 1
    client[0].socket.close()


def test_it_does_not_leave_while_somebody_holds_the_lock(here):
    """He is about to connect, or to start another one: neither is waited for."""
    with launch.runtime.lock():
        assert not here.server._may_leave()
    assert here.server._may_leave()


def test_it_does_not_remove_what_took_its_sockets_place(runtime, here):
    """Someone removed the socket, and somebody's daemon has made another."""
    (runtime / "sksmd.sock").unlink()
    with launch.listen():
        assert here.server._may_leave()
        here.server._door.remove()
        assert (runtime / "sksmd.sock").exists()


def test_once_it_left_the_socket_is_free_for_the_next(runtime, here):
    """Nothing that it leaves behind is in anybody's way."""
    assert here.server._may_leave()
    with pytest.raises(DaemonUnreachable):
        RemoteStore(start=False)
    here.server._door.remove()
    assert os.listdir(runtime) == ["lock"]


def come_and_go(rounds):
    """Be one of several clients of daemons that leave whenever they can."""

    def turns():
        for turn in range(rounds):
            some = Memory(PAGES)
            some.rows[:] = content(turn, PAGES)
            report = sksm.merge(some.rows)
            assert report.merged + report.stored == PAGES, report
            assert (some.rows == content(turn, PAGES)).all()
            sksm.unmerge(some.rows)
            session.current.close()
            assert (some.rows == content(turn, PAGES)).all()

    return turns


@pytest.mark.parametrize("rounds", [8, pytest.param(80, marks=pytest.mark.slow)])
def test_clients_of_daemons_that_always_leave_are_always_served(
    runtime, monkeypatch, rounds
):
    """With no patience at all a daemon leaves between any two clients."""
    monkeypatch.setenv("SKSM_IDLE_SECONDS", "0")
    pids = [start_child(come_and_go(rounds)) for _ in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
