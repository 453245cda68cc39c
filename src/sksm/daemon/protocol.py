"""What client and daemon say to each other.

One message is one packet of a Unix `SOCK_SEQPACKET` socket, in MessagePack, with
arrays as raw little-endian bytes. A client has one request under way at a time.

A client asks for a grant (`store.grants`) before it asks for slots, and each slot that
is answered belongs to the grant that the client got last.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

VERSION = 6
MOST_PAGES = 4096  # in one request
LARGEST = 1 << 17  # bytes of a message; a socket takes 200 KiB unless told otherwise


class Hello(msgspec.Struct, tag=True):
    """Sent first, by the client."""

    version: int


class Welcome(msgspec.Struct, tag=True):
    """The answer."""

    version: int
    pid: int
    seed: int
    pool: str  # as `Store.name`


class Begin(msgspec.Struct, tag=True):
    """Give me a new grant. Answered by `Granted`."""


class Granted(msgspec.Struct, tag=True):
    """The grant: the descriptor beside it, read-only."""


class Settle(msgspec.Struct, tag=True):
    """Of the slots answered since the last time, I have mapped these. Not answered."""

    runs: bytes  # pairs (int64) of slot and count
    everything: bool = False  # or all of them, whatever `runs` says


class Lookup(msgspec.Struct, tag=True):
    """Which slots have these fingerprints (uint64)? Answered by `Slots`."""

    prints: bytes
    only_asked: bool = False  # as `Store.knows`: none will be mapped


class Slots(msgspec.Struct, tag=True):
    """A slot (int64) for each fingerprint."""

    slots: bytes


class Claim(msgspec.Struct, tag=True):
    """Give me slots in a row, if each holds a page. Answered by `Claimed`."""

    slot: int
    pages: int


class Claimed(msgspec.Struct, tag=True):
    """Whether it was given them."""

    given: bool


class Offer(msgspec.Struct, tag=True):
    """Take pages of mine, or of another process of the daemon's domain."""

    runs: bytes  # pairs (int64) of page number and count
    pid: int = 0  # 0: mine
    alone: bool = False  # as for `Store.offer`


class Offered(msgspec.Struct, tag=True):
    """A slot (int64) for each page, and whether it is new (bool)."""

    slots: bytes
    fresh: bytes
    refusal: str


class Ask(msgspec.Struct, tag=True):
    """How do things stand? Answered by `Status`."""

    reclaim: bool = False  # free first what nobody maps


class Status(msgspec.Struct, tag=True):
    """What the daemon holds and what it costs."""

    pid: int
    clients: int
    slots: int
    pool_bytes: int
    index_bytes: int
    own_bytes: int  # the daemon's own memory, without the pool
    grants: int  # by which slots are mapped, or may be
    reclaimed: int  # slots freed since it started
    held_back: str  # why none could be freed the last time, or ""
    seconds: float  # since it started


class Supervise(msgspec.Struct, tag=True):
    """Answer calls of MADV_MERGE by me and all that I start.

    With the descriptor of their listener (`notify.listen`) beside it. Answered by
    `Supervised`, from when on a child of the daemon's does that.
    """


class Supervised(msgspec.Struct, tag=True):
    """Who does."""

    pid: int


class Failure(msgspec.Struct, tag=True):
    """What was wrong with the request. The daemon hangs up after it."""

    message: str


Request: TypeAlias = Hello | Begin | Settle | Lookup | Claim | Offer | Ask | Supervise
Reply: TypeAlias = (
    Welcome | Granted | Slots | Claimed | Offered | Status | Supervised | Failure
)

encode = msgspec.msgpack.encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode


class Malformed(ValueError):
    """A message that nobody who speaks this protocol would send."""


def integers(raw: bytes) -> npt.NDArray[np.int64]:
    """View the bytes of an array field as int64.

    Raises:
        Malformed: a length that is no whole number of items, or too many.
    """
    if len(raw) % 8 or len(raw) // 8 > MOST_PAGES:
        raise Malformed(f"an array of {len(raw)} bytes")
    return np.frombuffer(raw, np.int64)


def send(
    connection: socket.socket,
    message: Request | Reply,
    fds: Sequence[int] = (),
    flags: int = 0,
) -> None:
    """Send one message, and descriptors with it.

    Raises:
        OSError: as `sendmsg` does.
    """
    # Not socket.send_fds: it drops the flags it is given (Python 3.11 to 3.13).
    beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, np.array(fds, "<i4").tobytes())]
    connection.sendmsg([encode(message)], beside if fds else [], flags)


def receive(connection: socket.socket, fds: int = 0) -> tuple[bytes, list[int]]:
    """Take one message, and the descriptors with it; b"" at the end.

    Raises:
        Malformed: longer than `LARGEST`.
        OSError: as `recvmsg` does. Descriptors for which this process has no room
            are missing, which is no error.
    """
    # Not socket.recv_fds: it drops the flags it is given (Python 3.11 to 3.13).
    data, messages, flags, _ = connection.recvmsg(
        LARGEST, socket.CMSG_LEN(4 * fds) if fds else 0, socket.MSG_CMSG_CLOEXEC
    )
    received: list[int] = []
    for level, kind, content in messages:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received += np.frombuffer(content[: len(content) // 4 * 4], "<i4").tolist()
    if flags & socket.MSG_TRUNC:
        for fd in received:
            os.close(fd)
        raise Malformed(f"a message of more than {LARGEST} bytes")
    return data, received


def peer(connection: socket.socket) -> tuple[int, int]:
    """Give pid and uid of the other side, as the kernel knows them."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = np.frombuffer(raw, "<i4").tolist()
    return pid, uid
