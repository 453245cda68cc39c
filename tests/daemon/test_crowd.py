"""Many clients at once, and tables of open files that are full."""

import concurrent.futures
import errno
import itertools
import os
import resource
import selectors
import threading

import pytest

import sksm
from sksm import session
from sksm.daemon import launch, protocol
from sksm.daemon.client import RemoteStore
from sksm.daemon.server import Server
from sksm.engines.pool import PoolEngine
from sksm.errors import SksmError
from sksm.pipeline import merge
from sksm.process.local import ThisProcess
from tests.conftest import Memory, poll
from tests.rows import content
from tests.support import Raw, count_fds, in_child, start_child

CLIENTS = 64
COMMON, OWN = 32, 8


def merge_common_and_own(number, merge_one, kept):
    """Offer what all have and what nobody else has; give how many were stored.

    What nobody maps any more would be freed, and stored again: it goes into `kept`.
    """
    stored = 0
    for seed, pages in ((0, COMMON), (1000 + number, OWN), (0, COMMON)):
        some = Memory(pages)
        kept.append(some)
        some.rows[:] = content(seed, pages)
        report = merge_one(some)
        assert report.merged + report.stored == pages, report
        assert (some.rows == content(seed, pages)).all()
        stored += report.stored
    return stored


def test_64_processes_at_once_share_every_page_once(daemon):
    """All are served; whoever is first with a page stores it, for all others."""
    results, answers = os.pipe()
    go, start = os.pipe()
    stay, leave = os.pipe()

    def take_part(number):
        os.close(start)
        os.close(leave)
        kept = []
        os.read(go, 1)  # the end of file is the starting gun
        merge_one = lambda some: sksm.merge(some.rows)  # noqa: E731
        stored = merge_common_and_own(number, merge_one, kept)
        os.write(answers, bytes([stored]))
        os.read(stay, 1)

    pids = [start_child(lambda n=n: take_part(n)) for n in range(CLIENTS)]
    os.close(start)
    stored = b"".join(os.read(results, 1) for _ in range(CLIENTS))
    assert sum(stored) == COMMON + CLIENTS * OWN
    assert daemon.status(reclaim=True).slots == COMMON + CLIENTS * OWN
    os.close(leave)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * CLIENTS
    poll(lambda: daemon.status(reclaim=True).slots == 0)
    for fd in (results, answers, go, stay):
        os.close(fd)


def test_64_threads_with_a_connection_each_share_every_page_once(daemon):
    """Connections are independent; so are merges of memory of one process."""
    everybody = threading.Barrier(CLIENTS)

    def take_part(number):
        store = RemoteStore()
        everybody.wait(30)

        def merge_one(some):
            with ThisProcess(pinned=True) as space, store.granted():
                return merge(space, some.span, engine=PoolEngine(store))

        stored = merge_common_and_own(number, merge_one, kept := [])
        everybody.wait(60)
        store.close()
        kept.clear()
        return stored

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as threads:
        stored = sum(threads.map(take_part, range(CLIENTS)))
    assert stored == COMMON + CLIENTS * OWN


def test_who_finds_the_daemons_table_full_waits_until_somebody_leaves(runtime, daemon):
    """The connection waits in the backlog; nobody is lost, nothing is dropped."""
    daemon.limit(resource.RLIMIT_NOFILE, len(daemon.quiet_fds()) + 5)
    clients = [Raw(runtime) for _ in range(6)]  # a client costs two, a hello one
    served = [client for client in clients if is_served(client)]
    assert 1 <= len(served) < 6

    daemon.limit(resource.RLIMIT_NOFILE, None)
    with Raw(runtime) as late:
        assert late.greet().pid == daemon.pid
    for client in clients:
        client.socket.close()
    daemon.quiet_fds()


def is_served(client):
    client.socket.settimeout(0.2)
    try:
        reply = client.greet()
    except TimeoutError:
        return False  # it waits at the door
    except ConnectionError:
        return False
    assert isinstance(reply, protocol.Welcome | protocol.Failure)
    return isinstance(reply, protocol.Welcome)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_full_table_does_not_make_the_daemon_spin(runtime, monkeypatch, code):
    """It stops listening for a moment: the client at the door would wake it at once."""
    listener = launch.listen()
    listener.setblocking(False)
    server = Server(listener, 60.0, runtime / "sksmd.sock")
    watched = server._selector
    watched.register(listener, selectors.EVENT_READ, None)

    class Full:
        def __getattr__(self, name):
            return getattr(listener, name)

        def accept(self):
            raise OSError(code, os.strerror(code))

    with Raw(runtime) as waiting, monkeypatch.context() as patch:
        patch.setattr(server, "_listener", Full())
        for _ in range(3):
            server._accept()
        patch.undo()
        assert watched.select(0) == []
        assert 0 < server._pause() <= 0.2  # seconds until it looks again
        server._accept_at = 1e-9  # by now
        server._pause()
        assert [key.fileobj for key, _ in watched.select(0)] == [listener]
        server._accept()
        assert len(server._clients) == 1
        waiting.socket.close()
    server._close()


def number_after(spare):
    """Give the lowest number with `spare` unused descriptors below it."""
    free = (n for n in itertools.count() if not os.path.lexists(f"/proc/self/fd/{n}"))
    return next(itertools.islice(free, spare, None))


def merge_with_few_descriptors(some, spare):
    """Merge with room for `spare` more descriptors; give the report or the refusal."""
    session.current.close()
    before, limits = count_fds(), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number_after(spare), limits[1]))
    try:
        return sksm.merge(some.rows)
    except SksmError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert (some.rows == content(1, 8)).all()
        session.current.close()
        assert count_fds() == before


@pytest.mark.parametrize("threads", [1, 2])
def test_a_client_with_a_full_table_gets_a_clear_error_and_loses_nothing(
    daemon, threads
):
    """Wherever a descriptor is missing: an error that names `ulimit`, bytes intact."""

    def merge_with_more_and_more():
        near, far = os.pipe()
        for _ in range(threads - 1):
            threading.Thread(target=os.read, args=(near, 1), daemon=True).start()
        some = Memory(8)
        some.rows[:] = content(1, 8)
        sksm.merge(Memory(1).rows)
        outcomes = [merge_with_few_descriptors(some, spare) for spare in range(12)]
        refused = [outcome for outcome in outcomes if isinstance(outcome, str)]
        assert refused
        assert all("ulimit -n" in message for message in refused), refused
        reports = outcomes[len(refused) :]
        assert reports[0].stored + reports[0].merged == 8  # offered before, perhaps
        assert reports[-1].already == 8
        os.close(far)

    in_child(merge_with_more_and_more)


def test_a_client_with_a_full_table_cannot_start_a_daemon_and_says_so(runtime):
    """The program gets an error, not a daemon that cannot work."""

    def start_with_few_descriptors():
        some = Memory(8)
        some.rows[:] = content(1, 8)
        for spare in range(8):
            outcome = merge_with_few_descriptors(some, spare)
            assert not isinstance(outcome, str) or "ulimit -n" in outcome, outcome
        assert sksm.merge(some.rows).scanned == 8

    in_child(start_with_few_descriptors)
    assert (runtime / "sksmd.sock").exists()
