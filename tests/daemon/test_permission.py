"""What the daemon may not read, it refuses with the way out."""

import contextlib
import errno
import os

import pytest

import sksm
from sksm import session
from sksm.daemon import client, protocol
from sksm.daemon.client import RemoteStore
from sksm.engines.pool import PoolEngine
from sksm.errors import NotPermitted
from sksm.linux import libc
from sksm.pipeline import merge
from sksm.process import permission
from sksm.process.local import ThisProcess
from sksm.spans import PAGE_SIZE, Span
from sksm.store import local
from sksm.store.local import LocalStore
from tests.conftest import Memory
from tests.rows import content
from tests.support import in_child

ordinary = pytest.mark.skipif(os.getuid() == 0, reason="root may look at everything")


def test_yamas_refusal_is_counted_and_named(monkeypatch):
    """process_vm_readv gives EPERM: the sysctl is in the reason, the bytes stay."""
    store, some = LocalStore(), Memory(4)
    some.rows[:] = content(1, 4)

    def forbidden(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(local, "read_pages", forbidden)
    with ThisProcess(pinned=True) as space, store.granted():
        report = merge(space, some.span, engine=PoolEngine(store))

    assert report.refused == 4
    assert "kernel.yama.ptrace_scope" in next(iter(report.reasons))
    assert (some.rows == content(1, 4)).all()
    store.close()


@pytest.mark.parametrize(
    ("scope", "named"), [("0\n", False), ("1\n", True), ("2\n", False), (None, False)]
)
def test_the_daemon_is_named_as_tracer_where_yama_asks_for_it(
    daemon, monkeypatch, tmp_path, scope, named
):
    """Scope 1 lets those read whom a process names; others it does not help."""
    calls = []
    monkeypatch.setattr(permission, "YAMA", tmp_path / "ptrace_scope")
    monkeypatch.setattr(client.libc, "prctl", lambda *args: calls.append(args))
    if scope:
        permission.YAMA.write_text(scope)

    RemoteStore(start=False).close()

    expected = [(libc.PR_SET_PTRACER, daemon.pid, 0, 0, 0)] if named else []
    assert calls == expected


def test_a_kernel_without_yama_is_no_obstacle(daemon, monkeypatch, tmp_path):
    """PR_SET_PTRACER is EINVAL there; the scope file and the call may disagree."""

    def unknown(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "ptrace_scope").write_text("1\n")
    monkeypatch.setattr(permission, "YAMA", tmp_path / "ptrace_scope")
    monkeypatch.setattr(client.libc, "prctl", unknown)
    some = Memory(4)
    some.rows[:] = content(1, 4)
    assert sksm.merge(some.rows).stored == 4


def test_what_only_we_may_read_the_daemon_gets_from_us(daemon, puppets, monkeypatch):
    """Pages of our descendants, where Yama keeps all others from them."""
    said, send = [], protocol.send
    monkeypatch.setattr(permission, "only_descendants", lambda: True)
    monkeypatch.setattr(
        protocol, "send", lambda *args: (said.append(args[1]), send(*args))
    )
    puppet = puppets()
    puppet.fill("data", 1, 16)
    at = puppet.address("data")
    spans = [Span(at, at + 4 * PAGE_SIZE), Span(at + 8 * PAGE_SIZE, at + 9 * PAGE_SIZE)]

    with contextlib.closing(RemoteStore(start=False)) as store, store.granted():
        answers = list(store.offers(puppet.pid, [spans, spans[:1]]))
        slots = answers[0][0].tolist()
        found = b"".join(os.pread(store.pool, PAGE_SIZE, n * PAGE_SIZE) for n in slots)

    assert {offer.pid for offer in said if isinstance(offer, protocol.Offer)} == {0}
    assert found == content(1, 16)[[0, 1, 2, 3, 8]].tobytes()
    assert answers[1][0].tolist() == slots[:4]
    assert [fresh.all() for _, fresh, _ in answers] == [True, False]


def test_a_process_that_may_not_be_looked_at_keeps_its_slots_and_no_other(
    daemon, puppets
):
    """Also a child that was never a client."""
    others, parent = puppets(), puppets()
    for seed, puppet in ((1, others), (2, parent)):
        puppet.fill("data", seed, 16)
        puppet.merge("data")
    child = parent.fork_hidden()
    others.end()
    parent.hide()
    parent.unmerge("data")

    status = daemon.status(reclaim=True)
    assert (status.slots, status.reclaimed) == (16, 16)

    parent.end_child(child)
    assert daemon.status(reclaim=True).slots == 0


@ordinary
def test_a_program_that_hides_from_itself_gets_a_clear_error(runtime):
    """Not dumpable, its own /proc files belong to root."""

    def hide_and_merge():
        some = Memory(4)
        some.rows[:] = content(1, 4)
        libc.prctl(libc.PR_SET_DUMPABLE, 0, 0, 0, 0)
        with pytest.raises(NotPermitted, match="PR_SET_DUMPABLE"):
            sksm.merge(some.rows)
        assert (some.rows == content(1, 4)).all()
        libc.prctl(libc.PR_SET_DUMPABLE, 1, 0, 0, 0)
        assert sksm.merge(some.rows).stored == 4

    in_child(hide_and_merge)


@pytest.mark.check
def test_a_merge_that_failed_keeps_no_slot(daemon):
    """Nor does one that had nothing to do."""
    some = Memory(4)
    sksm.merge(some.rows)
    with pytest.raises(OSError, match="not mapped"):
        sksm.merge_range(1 << 46, 4096)
    session.current.close()
    assert (daemon.status(reclaim=True).slots, daemon.status().grants) == (0, 0)
