"""No memory left for the pool: a counted refusal, and everything as it was."""

import errno
import os
import resource

import numpy as np
import pytest

import sksm
from sksm.daemon import launch, protocol
from sksm.daemon.server import Server
from sksm.spans import PAGE_SIZE
from sksm.store import pool
from sksm.store.local import LocalStore
from tests.conftest import Memory
from tests.rows import content
from tests.support import Raw

FULL = "no memory left for the pool"


def refused(report, pages):
    return report.refused == pages and FULL in "".join(report.reasons)


def test_a_full_pool_is_a_counted_refusal_until_there_is_room(daemon):
    """The daemon may not write one byte; then it may again."""
    some = Memory(8)
    some.rows[:] = content(1, 8)
    daemon.limit(resource.RLIMIT_FSIZE, 0)

    assert refused(sksm.merge(some.rows), 8)
    assert (some.rows == content(1, 8)).all()
    assert daemon.status().pool_bytes == 0

    daemon.limit(resource.RLIMIT_FSIZE, None)
    assert sksm.merge(some.rows).stored == 8
    assert (some.rows == content(1, 8)).all()


@pytest.mark.check
def test_a_pool_that_fills_up_within_a_request_takes_none_of_it(daemon):
    """Half of the pages were written: they are given back, nobody learns of them."""
    first, second = Memory(8), Memory(64)
    first.rows[:], second.rows[:] = content(1, 8), content(2, 64)
    sksm.merge(first.rows)
    daemon.limit(resource.RLIMIT_FSIZE, 40 * PAGE_SIZE)

    assert refused(sksm.merge(second.rows), 64)
    assert (second.rows == content(2, 64)).all()
    status = daemon.status()
    assert status.slots == 8
    assert status.pool_bytes == 8 * PAGE_SIZE

    third = Memory(8)  # what is known needs no room
    third.rows[:] = content(1, 8)
    assert sksm.merge(third.rows).merged == 8
    daemon.limit(resource.RLIMIT_FSIZE, None)
    assert sksm.merge(second.rows).stored == 64
    for memory, seed, pages in ((first, 1, 8), (second, 2, 64), (third, 1, 8)):
        assert (memory.rows == content(seed, pages)).all()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM, errno.EFBIG])
@pytest.mark.parametrize("call", ["ftruncate", "pwrite"])
def test_whatever_the_kernel_calls_it_a_lack_of_memory_is_a_refusal(
    monkeypatch, code, call
):
    """Growing the file and filling it fail alike, and the store goes on."""
    store, some = LocalStore(), Memory(4)
    some.rows[:] = content(1, 4)

    def lacking(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(pool.os, call, lacking)
        slots, fresh, why = store.offer(os.getpid(), [some.span])
        assert slots.tolist() == [-1] * 4
        assert not fresh.any()
        assert why.startswith(FULL)
        assert os.strerror(code) in why

    slots, fresh, why = store.offer(os.getpid(), [some.span])
    assert (slots.tolist(), why) == ([0, 1, 2, 3], "")
    there = os.pread(store.pool, 4 * PAGE_SIZE, 0)
    assert there == some.rows.tobytes()
    store.close()


@pytest.fixture
def here(runtime):
    """A daemon in this process, with one client, that does nothing by itself."""
    listener = launch.listen()
    listener.setblocking(False)
    server = Server(listener, 600.0, runtime / "sksmd.sock")
    with Raw(runtime) as client:
        server._accept()
        client.say(protocol.Hello(protocol.VERSION))
        server._answer(next(iter(server._clients)))
        client.hear()
        client.say(protocol.Begin())
        server._answer(next(iter(server._clients)))
        client.hear()
        yield server, client
    server._close()


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")]
)
def test_a_daemon_without_memory_for_a_request_refuses_it(here, monkeypatch, error):
    """Room for the pages to be read into is memory, too; the daemon goes on."""
    server, client = here

    def lacking(*_, **__):
        raise error

    monkeypatch.setattr(server._store, "offer", lacking)
    client.say(protocol.Offer(np.array([[1, 3]], np.int64).tobytes()))
    server._answer(next(iter(server._clients)))

    reply = client.hear()
    assert np.frombuffer(reply.slots, np.int64).tolist() == [-1, -1, -1]
    assert reply.refusal.startswith("the daemon could not take it")
    assert len(server._clients) == 1


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOLCK, "No locks")])
def test_a_sweep_that_fails_frees_nothing_and_says_why(here, monkeypatch, error):
    """The daemon goes on, and frees them when it can."""
    server, client = here
    some = Memory(4)
    some.rows[:] = content(1, 4)
    client.say(protocol.Offer(_runs(some)))
    server._answer(next(iter(server._clients)))
    client.hear()

    def ask():
        client.say(protocol.Ask(reclaim=True))
        server._answer(next(iter(server._clients)))
        return client.hear()

    def failing(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("sksm.linux.ofd_locks.is_locked", failing)
        status = ask()
        assert (status.slots, status.reclaimed) == (4, 0)
        assert status.held_back.startswith("cannot find what is free")
    status = ask()
    assert (status.slots, status.reclaimed, status.held_back) == (0, 4, "")


def _runs(some):
    pair = (some.span.start // PAGE_SIZE, some.span.pages)
    return np.array([pair], np.int64).tobytes()
