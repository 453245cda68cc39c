"""What client and daemon say to each other, and what neither would say."""

import os
import socket

import msgspec
import numpy as np
import pytest

from sksm.daemon import protocol

pytestmark = [pytest.mark.check, pytest.mark.pure]

REQUESTS = [
    protocol.Hello(3),
    protocol.Begin(),
    protocol.Settle(b"12345678"),
    protocol.Lookup(b"12345678", only_asked=True),
    protocol.Claim(3, 4),
    protocol.Offer(b"\0" * 16),
    protocol.Ask(reclaim=True),
    protocol.Supervise(),
]
REPLIES = [
    protocol.Welcome(1, 42, 2**64 - 1, "name"),
    protocol.Granted(),
    protocol.Slots(b"12345678"),
    protocol.Claimed(True),
    protocol.Offered(b"12345678", b"\1", "why"),
    protocol.Status(1, 2, 3, 4, 5, 6, 7, 8, "why", 8.5),
    protocol.Supervised(42),
    protocol.Failure("why"),
]


def named(message):
    return type(message).__name__


@pytest.fixture
def pair():
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        yield near, far


@pytest.mark.parametrize("request_", REQUESTS, ids=named)
def test_requests_come_back_as_they_were(request_):
    """Every field of every request survives the wire."""
    assert protocol.decode_request(protocol.encode(request_)) == request_


@pytest.mark.parametrize("reply", REPLIES, ids=named)
def test_replies_come_back_as_they_were(reply):
    """Every field of every reply survives the wire; a seed takes all 64 bits."""
    assert protocol.decode_reply(protocol.encode(reply)) == reply


def test_every_message_is_tried_here():
    """Whoever adds a message adds it above."""
    assert {type(m) for m in REQUESTS} == set(protocol.Request.__args__)
    assert {type(m) for m in REPLIES} == set(protocol.Reply.__args__)


@pytest.mark.parametrize("reply", REPLIES, ids=named)
def test_a_reply_is_no_request(reply):
    """The daemon understands its own words from nobody."""
    with pytest.raises(msgspec.ValidationError):
        protocol.decode_request(protocol.encode(reply))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"GET / HTTP/1.1\r\n\r\n",
        protocol.encode({"type": "Hello"}),
        protocol.encode({"type": "Hello", "version": "1"}),
        protocol.encode({"type": "Lookup", "prints": 5}),
        protocol.encode({"type": "Lookup", "prints": "text"}),
        protocol.encode({"type": "Nothing"}),
        protocol.encode([1, 2]),
        protocol.encode(protocol.Hello(1))[:-1],
        protocol.encode(protocol.Hello(1)) + b"\0",
    ],
)
def test_garbage_is_an_error_of_its_own_kind(data):
    """What is not a request raises what the daemon answers with a failure."""
    with pytest.raises((msgspec.MsgspecError, ValueError)):
        protocol.decode_request(data)


def test_arrays_come_back_as_they_were():
    """Numbers travel as raw bytes, with their sign and full width."""
    slots = np.array([-2, -1, 0, 2**62])
    prints = np.array([0, 2**64 - 1], np.uint64)
    assert protocol.integers(slots.tobytes()).tolist() == slots.tolist()
    again = protocol.integers(prints.tobytes()).view(np.uint64)
    assert again.tolist() == prints.tolist()
    assert len(protocol.integers(b"")) == 0


@pytest.mark.parametrize("size", [1, 7, 9, 8 * protocol.MOST_PAGES - 1])
def test_half_a_number_is_malformed(size):
    """A length that is no whole number of items is refused, not rounded."""
    with pytest.raises(protocol.Malformed, match=str(size)):
        protocol.integers(bytes(size))


def test_most_pages_are_the_most():
    """A client cannot have the daemon work on more at once."""
    most = 8 * protocol.MOST_PAGES
    assert len(protocol.integers(bytes(most))) == protocol.MOST_PAGES
    with pytest.raises(protocol.Malformed):
        protocol.integers(bytes(most + 8))


def test_the_largest_question_and_its_answer_fit_a_message():
    """Limits agree with each other: no legal request is too long to send."""
    most = protocol.MOST_PAGES
    lookup = protocol.encode(protocol.Lookup(bytes(8 * most)))
    offered = protocol.encode(protocol.Offered(bytes(8 * most), bytes(most), "w"))
    assert max(len(lookup), len(offered)) <= protocol.LARGEST


def test_messages_keep_their_bounds(pair):
    """One send is one message, as long as it is."""
    near, far = pair
    near.send(b"one")
    near.send(b"x" * protocol.LARGEST)
    assert protocol.receive(far) == (b"one", [])
    assert protocol.receive(far) == (b"x" * protocol.LARGEST, [])


def test_the_end_is_an_empty_message(pair):
    """Hanging up is told as no bytes."""
    near, far = pair
    near.close()
    assert protocol.receive(far) == (b"", [])


def test_a_message_that_is_too_long_is_malformed(pair):
    """It is not cut, and descriptors that came with it are not kept."""
    near, far = pair
    before = set(os.listdir("/proc/self/fd"))
    with open(os.devnull) as file:
        socket.send_fds(near, [b"x" * (protocol.LARGEST + 1)], [file.fileno()])
    with pytest.raises(protocol.Malformed):
        protocol.receive(far, fds=1)
    assert set(os.listdir("/proc/self/fd")) == before


def test_descriptors_arrive_closed_on_exec(pair, tmp_path):
    """They are the sender's files, and not for our children."""
    near, far = pair
    with (tmp_path / "file").open("w") as file:
        socket.send_fds(near, [b"here"], [file.fileno()])
        data, fds = protocol.receive(far, fds=1)
        assert data == b"here"
        assert os.path.samestat(os.fstat(fds[0]), os.fstat(file.fileno()))
        assert not os.get_inheritable(fds[0])
    os.close(fds[0])


def test_descriptors_that_nobody_asked_for_are_not_kept(pair):
    """A client cannot fill the daemon's table with files."""
    near, far = pair
    before = set(os.listdir("/proc/self/fd"))
    with open(os.devnull) as file:
        socket.send_fds(near, [b"here"], [file.fileno()] * 5)
    assert protocol.receive(far) == (b"here", [])
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_kernel_says_who_the_peer_is(pair):
    """Not the peer itself."""
    assert protocol.peer(pair[0]) == (os.getpid(), os.getuid())
