"""sksmd: the process that owns a store.

One thread, one loop. It trusts its clients with nothing but their own pages.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import selectors
import signal
import socket
import time
from pathlib import Path

import msgspec

from sksm.daemon import protocol, runtime
from sksm.daemon.answers import Answers
from sksm.daemon.protocol import Malformed
from sksm.daemon.signals import Wakeup
from sksm.daemon.sweeper import Sweeper
from sksm.errors import SksmError
from sksm.linux import notify
from sksm.process.domain import Domain
from sksm.store.grants import Grant, Grants
from sksm.store.local import LocalStore

_log = logging.getLogger("sksmd")
_LONGEST_LINGER = 3600.0  # seconds between two looks whether to leave
_FULL_TABLE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclasses.dataclass(eq=False, slots=True)
class Client:
    """One connection."""

    connection: socket.socket
    pid: int
    pidfd: int
    greeted: bool = False
    grant: Grant | None = None  # the last one that it got


@dataclasses.dataclass(frozen=True, slots=True)
class Supervision:
    """What a child of the daemon does: see `Supervisor`."""

    listener: int
    known_filters: int


class _Child(BaseException):
    """We are a child of the server's. Nothing may handle it on its way out."""

    def __init__(self, task: Supervision) -> None:
        super().__init__()
        self.task = task


class Server:
    """Serves a listening socket until nobody uses the store, or SIGTERM.

    Args:
        listener: a bound and listening `SOCK_SEQPACKET` socket.
        idle_seconds: how long to stay without clients and without live slots;
            infinite for a service that somebody else starts and ends.
        path: where the socket is, if it is to be removed at the end.
        domain: whose memory it holds, if not that of this user's programs.
    """

    def __init__(
        self,
        listener: socket.socket,
        idle_seconds: float,
        path: Path | None = None,
        domain: Domain | None = None,
    ) -> None:
        self._listener = listener
        self._domain = domain or Domain(os.getuid())
        self._door = runtime.Door(path) if path else None
        self._idle_seconds = idle_seconds
        self._store = LocalStore()
        self._grants = Grants(self._store)
        self._clients: set[Client] = set()
        self._sweeper = Sweeper(self._store, self._grants)
        self._answers = Answers(self._store, self._grants, self._sweeper, self._domain)
        self._quiet_since = time.monotonic()
        self._linger_seconds = idle_seconds
        self._accept_at = 0.0
        self._stopping = False
        self._selector = selectors.DefaultSelector()

    def run(self) -> Supervision | None:
        """Serve until it is time to leave.

        Returns:
            None; or, in a child of the process that was called, what that is to do
            when it has let go of this.
        """
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        try:
            with Wakeup(signal.SIGTERM, signal.SIGINT) as wake:
                self._selector.register(wake, selectors.EVENT_READ, wake)
                while not self._stopping and not self._may_leave():
                    for key, _ in self._selector.select(self._pause()):
                        self._serve(key)
        except _Child as child:
            return child.task
        if self._door:
            self._door.remove()
        self._close()
        return None

    def _serve(self, key: selectors.SelectorKey) -> None:
        if key.data is None:
            self._accept()
        elif isinstance(key.data, socket.socket):
            self._stopping = True
        elif key.data in self._clients:
            if key.fd == key.data.pidfd:  # it ended; a child may keep the socket open
                self._drop(key.data)
            else:
                self._answer(key.data)

    # -- coming and going

    def _accept(self) -> bool:
        """Let one client in; say whether there was one at the door."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _FULL_TABLE:
                raise
            _log.warning("cannot accept: %s", error.strerror)
            if not self._accept_at:
                self._selector.unregister(self._listener)
            self._accept_at = time.monotonic() + 0.2  # try again in a moment
            return True
        pid, uid = protocol.peer(connection)
        refusal = _refusal(pid, uid)
        try:
            pidfd = os.pidfd_open(pid) if not refusal else -1
        except OSError as error:
            refusal = f"no hold of process {pid}: {error.strerror}"
        if refusal:
            _send(connection, protocol.Failure(refusal))
            connection.close()
            return True
        client = Client(connection, pid, pidfd)
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, client)
        self._selector.register(pidfd, selectors.EVENT_READ, client)
        return True

    def _drop(self, client: Client) -> None:
        self._clients.discard(client)
        self._selector.unregister(client.connection)
        self._selector.unregister(client.pidfd)
        client.connection.close()
        os.close(client.pidfd)
        self._quiet_since = time.monotonic()
        self._linger_seconds = self._idle_seconds
        if client.grant:
            self._sweeper.client_left()

    def _pause(self) -> float | None:
        now = time.monotonic()
        if self._accept_at and now >= self._accept_at:
            self._accept_at = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ, None)
        if now >= self._sweeper.due:
            self._sweeper.run(again=bool(self._clients))
        wakes = [self._sweeper.due, self._accept_at or float("inf")]
        if not self._clients:
            wakes.append(self._quiet_since + self._linger_seconds)
        wake = min(wakes)
        return None if wake == float("inf") else max(0.0, wake - now)

    def _may_leave(self) -> bool:
        """Leave if nobody is there, nobody maps a slot and nobody is at the door.

        The socket goes out of sight first, under the lock. Who came before that
        is seen, and let in; who comes after waits for the lock, to make another.
        """
        quiet = time.monotonic() - self._quiet_since
        if self._clients or quiet < self._linger_seconds:
            return False
        self._sweeper.run(again=False)
        self._linger_seconds = min(2 * self._linger_seconds, _LONGEST_LINGER)
        self._quiet_since = time.monotonic()  # else, look again after a while
        if len(self._grants) or self._store.usage()["slots"]:
            return False
        if self._door is None:
            return True  # who is at the door stays there, for the next daemon
        try:
            with runtime.lock(self._domain, wait=False):
                self._door.hide()
                if self._accept():
                    self._door.show()
                else:
                    self._stopping = True
        except BlockingIOError:
            return False  # somebody is about to connect
        except (OSError, SksmError):
            self._stopping = True  # the directory is gone: nobody finds us any more
        return self._stopping

    def _close(self) -> None:
        for client in list(self._clients):
            self._drop(client)
        self._selector.close()
        self._listener.close()
        self._store.close()

    # -- answering

    def _answer(self, client: Client) -> None:
        fds: list[int] = []
        try:
            data, fds = protocol.receive(client.connection, 1)
            if not data:
                self._drop(client)
                return
            reply = self._reply(client, protocol.decode_request(data), fds)
            if reply is None:
                return
        except ConnectionError:
            self._drop(client)
            return
        except (Malformed, msgspec.MsgspecError, ValueError) as error:
            reply = protocol.Failure(f"malformed request: {error}")
        except (OSError, MemoryError) as error:
            _log.exception("process %d asked for what cannot be done", client.pid)
            reply = protocol.Failure(f"it cannot be done: {error}")
        finally:
            for fd in fds:
                os.close(fd)
        self._send(client, reply)

    def _send(self, client: Client, reply: protocol.Reply) -> None:
        fds = []
        if isinstance(reply, protocol.Granted):
            try:
                client.grant, fd = self._grants.new()
                fds.append(fd)
            except OSError as error:
                reply = protocol.Failure(f"no descriptor for you: {error.strerror}")
        try:
            sent = _send(client.connection, reply, fds)
        finally:
            for fd in fds:
                os.close(fd)
        if not sent or isinstance(reply, protocol.Failure):
            self._drop(client)

    def _reply(
        self, client: Client, request: protocol.Request, fds: list[int]
    ) -> protocol.Reply | None:
        if isinstance(request, protocol.Hello):
            return self._greet(client, request)
        if not client.greeted:
            return protocol.Failure("say hello first")
        reply: protocol.Reply | None = None
        match request:
            case protocol.Begin():
                reply = protocol.Granted()
            case protocol.Lookup():
                reply = self._answers.look_up(client.grant, request)
            case protocol.Claim():
                reply = self._answers.claim(client.grant, request)
            case protocol.Offer():
                reply = self._answers.take(client.grant, client.pid, request)
            case protocol.Settle():
                self._answers.settle(client.grant, request)
            case protocol.Ask():
                reply = self._answers.status(request.reclaim, len(self._clients))
            case protocol.Supervise():
                reply = self._supervise(client, fds)
        return reply

    def _greet(self, client: Client, hello: protocol.Hello) -> protocol.Reply:
        if hello.version != protocol.VERSION:
            return protocol.Failure(
                f"the daemon speaks version {protocol.VERSION}, not {hello.version}: "
                f"end it (kill {os.getpid()}), the next merge starts its own"
            )
        client.greeted = True
        store = self._store
        return protocol.Welcome(protocol.VERSION, os.getpid(), store.seed, store.name)

    def _supervise(self, client: Client, fds: list[int]) -> protocol.Reply:
        """Leave it to a child, which is all the memory of ours that it needs."""
        if not fds or not notify.is_listener(fds[0]):
            raise Malformed("no listener beside it, or no room for one")
        from sksm.daemon import supervisor  # noqa: PLC0415  here: for all children

        try:
            known_filters = supervisor.known_filters(client.pid)
        except SksmError as error:
            return protocol.Failure(str(error))
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
        if pid := os.fork():
            return protocol.Supervised(pid)
        raise _Child(Supervision(fds.pop(), known_filters))


def _refusal(pid: int, uid: int) -> str:
    if uid != os.getuid():
        return f"this daemon serves uid {os.getuid()} and nobody else"
    if pid == 0:
        return "you are in a pid namespace that this daemon cannot see into"
    return ""


def _send(
    connection: socket.socket, reply: protocol.Reply, fds: list[int] | None = None
) -> bool:
    """Send without waiting; a client that does not read its answers is dropped."""
    try:
        protocol.send(connection, reply, fds or (), socket.MSG_DONTWAIT)
    except OSError:
        return False
    return True
