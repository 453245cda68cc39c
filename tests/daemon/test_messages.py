"""Nothing that a client says, or leaves unsaid, harms the daemon or the others."""

import array
import itertools
import os
import signal
import socket
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sksm.daemon import protocol
from sksm.spans import PAGE_SIZE
from tests.conftest import Memory
from tests.rows import content
from tests.support import Raw, anonymous_pages, start_child

HELLO = protocol.Hello(protocol.VERSION)
BEGIN = protocol.Begin()


def runs(*pairs):
    return np.array(pairs, np.int64).tobytes()


MALFORMED = {
    "garbage": b"\xc1\xff garbage",
    "half a message": protocol.encode(protocol.Lookup(b"x" * 800))[:99],
    "two messages in one": protocol.encode(HELLO) * 2,
    "no known tag": msgspec.msgpack.encode({"type": "Reboot"}),
    "an answer": protocol.encode(protocol.Slots(b"")),
    "a number": msgspec.msgpack.encode(7),
    "a wrong type": msgspec.msgpack.encode({"type": "Lookup", "prints": 7}),
    "a missing field": msgspec.msgpack.encode({"type": "Offer"}),
    "deep nesting": b"\x91" * 60_000 + b"\xc0",
    "a giant announced": b"\xdd\xff\xff\xff\xff",
    "prints of odd length": protocol.Lookup(b"x" * 13),
    "too many prints": protocol.Lookup(b"x" * 8 * (protocol.MOST_PAGES + 1)),
    "runs of odd length": protocol.Offer(b"x" * 17),
    "half a run": protocol.Offer(b"\1" * 8),
    "no runs": protocol.Offer(b""),
    "an empty run": protocol.Offer(runs((1000, 0))),
    "a run before the start": protocol.Offer(runs((-1, 2))),
    "a negative count": protocol.Offer(runs((1000, -2))),
    "a huge count": protocol.Offer(runs((1000, 2**62))),
    "counts that overflow": protocol.Offer(
        runs((1, 2**62), (1, 2**62), (1, 2**63 - 1))
    ),
    "a page number out of this world": protocol.Offer(runs((2**62, 1))),
    "one page too many": protocol.Offer(runs((1000, protocol.MOST_PAGES), (9000, 1))),
    "slots below the first": protocol.Claim(-1, 2),
    "no slots": protocol.Claim(3, 0),
    "more slots than there can be": protocol.Claim(3, 2**40),
    "mapped runs of odd length": protocol.Settle(b"x" * 17),
    "half a mapped run": protocol.Settle(b"\1" * 8),
    "a mapped run without slots": protocol.Settle(runs((3, 0))),
    "mapped runs that overflow": protocol.Settle(runs((2**62, 2**62))),
    "no listener": protocol.Supervise(),
    "another version": protocol.Hello(protocol.VERSION + 1),
    "no version": msgspec.msgpack.encode({"type": "Hello", "version": "one"}),
}


def serves(runtime):
    """Another client is served, and its bytes come back right."""
    with Raw(runtime) as other:
        assert other.greet().version == protocol.VERSION
        other.ask(protocol.Begin())
        memory = Memory(4)
        memory.rows[:] = content(5, 4)
        first = memory.span.start // PAGE_SIZE
        reply = other.ask(protocol.Offer(runs((first, 4))))
        assert reply.refusal == ""
        assert len(set(np.frombuffer(reply.slots, np.int64).tolist())) == 4
    return True


@pytest.mark.parametrize("message", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_message_ends_that_connection_and_nothing_else(
    runtime, daemon, message
):
    """The sender is told why; the others are served; no descriptor stays open."""
    serves(runtime)
    open_before = daemon.quiet_fds()
    with Raw(runtime) as bad:
        bad.begin()
        reply = bad.ask(message)
        assert isinstance(reply, protocol.Failure)
        assert bad.hear() is None
        assert serves(runtime)
    assert daemon.quiet_fds() == open_before


@pytest.mark.parametrize(
    "request_",
    [protocol.Lookup(b""), protocol.Offer(b""), protocol.Ask(), protocol.Supervise()],
)
def test_a_request_before_hello_is_refused(runtime, daemon, request_):
    """Nobody is answered who has not told his version."""
    with Raw(runtime) as rude:
        assert "hello" in rude.ask(request_).message
        assert rude.hear() is None
    assert serves(runtime)


@pytest.mark.check
@pytest.mark.root
def test_a_client_of_another_user_is_refused_and_told(runtime, daemon, monkeypatch):
    """Even root's daemon shares nothing with anybody else: another trust domain."""
    runtime.chmod(0o711)
    monkeypatch.chdir(runtime)  # what is above it may be closed to others
    (runtime / "sksmd.sock").chmod(0o666)
    os.seteuid(65534)
    try:
        with Raw(Path()) as other:
            assert "uid 0 and nobody else" in other.hear().message
            assert other.hear() is None
    finally:
        os.seteuid(0)
    assert serves(runtime)


def test_an_oversized_message_is_refused(runtime, daemon):
    """More than a message may hold is cut off by the kernel, and noticed."""
    with Raw(runtime) as big:
        big.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        big.greet()
        reply = big.ask(b"\xc6" + b"x" * (protocol.LARGEST + 1))
        assert f"more than {protocol.LARGEST} bytes" in reply.message
    assert serves(runtime)


def test_descriptors_sent_to_the_daemon_are_not_taken(daemon):
    """They would be a way to fill its table of open files."""
    open_before = daemon.quiet_fds()
    passed = array.array("i", [0] * 8).tobytes()
    for _ in range(20):
        daemon.watcher.socket.sendmsg(
            [protocol.encode(protocol.Ask())],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)],
        )
        assert isinstance(daemon.watcher.hear(), protocol.Status)
    assert daemon.fds() == open_before


def test_what_is_no_listener_is_not_listened_to(runtime, daemon):
    """Any descriptor may come with the request."""
    serves(runtime)
    open_before = daemon.quiet_fds()
    with Raw(runtime) as one, open(os.devnull) as null:
        one.greet()
        protocol.send(one.socket, protocol.Supervise(), [null.fileno()])
        assert "no listener" in one.hear().message
        assert one.hear() is None
    assert serves(runtime)
    assert daemon.quiet_fds() == open_before
    assert psutil.Process(daemon.pid).children() == []


@pytest.mark.parametrize(
    "request_",
    [
        protocol.Lookup(b"12345678"),
        protocol.Offer(runs((1, 1))),
        protocol.Settle(b""),
    ],
)
def test_slots_are_told_to_nobody_who_has_no_grant(runtime, daemon, request_):
    """They could be freed and used again before they are mapped."""
    with Raw(runtime) as one:
        one.greet()
        assert "without a grant" in one.ask(request_).message
    assert serves(runtime)


def test_a_client_that_never_reads_its_answers_is_dropped(runtime, daemon):
    """Waiting for it would be waiting for ever."""
    with Raw(runtime) as deaf:
        deaf.begin()
        ask = itertools.repeat(protocol.Lookup(b"\1" * 8 * 4000))
        with pytest.raises(ConnectionError):
            list(map(deaf.say, ask))
    assert serves(runtime)


def test_clients_that_leave_at_any_moment_leave_nothing_behind(runtime, daemon):
    """Before hello, after it, with a request under way, with an answer unread."""
    serves(runtime)
    open_before = daemon.quiet_fds()
    pages = anonymous_pages(64)
    first = np.frombuffer(pages, np.uint8).ctypes.data // PAGE_SIZE
    for sayings in (
        [],
        [HELLO],
        [HELLO, HELLO],
        [HELLO, BEGIN],
        [HELLO, BEGIN, protocol.Offer(runs((first, 64)))],
        [HELLO, BEGIN, protocol.Lookup(b"\1" * 8), protocol.Lookup(b"\2" * 8)],
        [b""],
    ):
        with Raw(runtime) as brief:
            for saying in sayings:
                brief.say(saying)
    assert serves(runtime)
    assert daemon.quiet_fds() == open_before


def test_a_client_killed_in_the_middle_of_a_request_is_forgotten(runtime, daemon):
    """Its memory is read, or not; the daemon goes on either way."""
    serves(runtime)
    open_before = daemon.quiet_fds()

    def offer_and_die():
        rows = np.frombuffer(anonymous_pages(4096), np.uint8).reshape(-1, PAGE_SIZE)
        rows[:, 0] = 1
        one = Raw(runtime)
        one.begin()
        one.say(protocol.Offer(runs((rows.ctypes.data // PAGE_SIZE, 4096))))
        os.kill(os.getpid(), signal.SIGKILL)

    for pid in [start_child(offer_and_die) for _ in range(8)]:
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert serves(runtime)
    assert daemon.quiet_fds() == open_before


def test_a_dead_client_whose_child_holds_the_line_is_forgotten(runtime, daemon):
    """The end of the process counts, not the end of the connection."""
    serves(runtime)
    open_before = daemon.quiet_fds()
    near, far = os.pipe()

    def leave_a_child():
        one = Raw(runtime)
        one.begin()
        one.ask(protocol.Lookup(b"\0" * 8))
        if os.fork() == 0:
            os.close(far)
            os.read(near, 1)

    assert os.waitpid(start_child(leave_a_child), 0)[1] == 0
    assert daemon.quiet_fds() == open_before
    os.close(near)
    os.close(far)


def test_pages_that_are_not_there_are_refused_with_the_reason(runtime, daemon):
    """A hole in a run: none of the request is taken, and why is said."""
    with Raw(runtime) as one:
        one.begin()
        reply = one.ask(protocol.Offer(runs((1, 3))))
        assert reply.refusal.startswith("unmapped meanwhile")
        assert np.frombuffer(reply.slots, np.int64).tolist() == [-1, -1, -1]


fields = st.one_of(
    st.none(), st.integers(-(2**63), 2**63), st.binary(max_size=64), st.text(max_size=9)
)
tags = st.sampled_from(
    [*(kind.__name__ for kind in protocol.Request.__args__), "Status", "x"]
)
names = st.sampled_from(
    ["version", "prints", "runs", "reclaim", "slot", "pages", "only_asked", "type"]
)


@given(
    message=st.one_of(
        st.binary(min_size=1, max_size=300),
        st.builds(
            lambda tag, rest: msgspec.msgpack.encode({**rest, "type": tag}),
            tags,
            st.dictionaries(names, fields, max_size=3),
        ),
    ),
    polite=st.booleans(),
)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_message_whatever_ends_the_daemon(runtime, daemon, message, polite):
    """Any bytes, and any fields in the place of others."""
    with Raw(runtime) as one:
        if polite:
            one.begin()
        one.say(message)
    assert daemon.status().pid == daemon.pid
