"""A store that lives in the daemon, seen from a client."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from sksm.daemon import launch, protocol
from sksm.errors import DaemonUnreachable, NotPermitted, SksmError
from sksm.linux import libc
from sksm.process import permission
from sksm.process.domain import Domain
from sksm.process.reading import read_pages
from sksm.spans import PAGE_SIZE, Span
from sksm.store import Offered, Store
from sksm.store.local import LocalStore

_R = TypeVar("_R", bound=protocol.Reply)
PATIENCE_SECONDS = 60.0  # for one answer; the daemon serves one client at a time
_SILENT = f"sksmd gave no answer in {PATIENCE_SECONDS:.0f} seconds"


class RemoteStore:
    """A connection to the daemon, with its pool. Belongs to one process.

    Args:
        domain: whose daemon, if not this user's.
        start: start a daemon if there is none.

    Raises:
        DaemonUnreachable, NotPermitted: as `launch.connect`.
    """

    def __init__(self, domain: Domain | None = None, *, start: bool = True) -> None:
        self._connection = launch.connect(domain, start=start)
        self._connection.settimeout(PATIENCE_SECONDS)
        self._pool = -1
        try:
            hello = protocol.Hello(protocol.VERSION)
            welcome, fds = self._ask(hello, protocol.Welcome, fds=1)
            if not fds:
                message = "no room for the pool's descriptor: raise ulimit -n"
                raise OSError(errno.EMFILE, message)
        except BaseException:
            self._connection.close()
            raise
        self._pool = fds[0]
        self.seed = welcome.seed
        self.written, self.keeper = welcome.written, welcome.pid
        # What only we may read of other processes, the daemon reads of us.
        self._reads_itself = permission.only_descendants()
        _let_read(welcome.pid)

    def close(self) -> None:
        """Hang up. What was merged stays merged."""
        self._connection.close()
        if self._pool >= 0:
            os.close(self._pool)
            self._pool = -1

    def alive(self) -> bool:
        """Say whether the daemon holds its end of the line, asking it nothing."""
        line = select.poll()
        line.register(self._connection, select.POLLIN)
        return not line.poll(0)  # no hang-up, and no answer that nobody took

    @property
    def pool(self) -> int:
        """The pool's file, read-only."""
        return self._pool

    def upkeep_bytes(self) -> int:
        """Say what the daemon takes, if it would leave without us."""
        status = self.status()
        return 0 if status.slots else status.own_bytes

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Keep every slot as it is until the block ends."""
        pool = self._pool
        _share_lock(pool)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # closed with the connection
                fcntl.flock(pool, fcntl.LOCK_UN)

    def lookup(self, prints: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Find each fingerprint's slot; `UNSEEN` where there is none."""
        reply, _ = self._ask(protocol.Lookup(prints.tobytes()), protocol.Slots)
        self.written = reply.written
        return self._slots(reply.slots, len(prints))

    def offer(self, pid: int, spans: Iterable[Span], *, alone: bool = False) -> Offered:
        """Have the daemon take pages of a process into the pool."""
        return next(self.offers(pid, [list(spans)], alone=alone))

    def offers(
        self, pid: int, parts: Iterable[list[Span]], *, alone: bool = False
    ) -> Generator[Offered, None, None]:
        """Say all the requests at once: the daemon works while answers are used."""
        if self._reads_itself and pid != os.getpid():
            yield from self._copies(pid, parts, alone)
            return
        asked = []
        for spans in parts:
            runs = np.array(
                [(span.start // PAGE_SIZE, span.pages) for span in spans], np.int64
            )
            whose = 0 if pid == os.getpid() else pid
            self._say(protocol.Offer(runs.tobytes(), whose, alone))
            asked.append(int(runs[:, 1].sum()))
        try:
            while asked:
                yield self._offered(asked.pop(0))
        finally:  # nobody wants the rest, and the next answer must be the next one's
            while asked:
                self._offered(asked.pop(0))

    def _copies(
        self, pid: int, parts: Iterable[list[Span]], alone: bool
    ) -> Generator[Offered, None, None]:
        """Offer copies of another process's pages, as pages of our own."""
        for spans in parts:
            size = sum(span.size for span in spans)
            room = np.empty(size + PAGE_SIZE, np.uint8)
            first = -room.ctypes.data % PAGE_SIZE
            rows = room[first : first + size].reshape(-1, PAGE_SIZE)
            read_pages(pid, spans, rows)
            start = rows.ctypes.data
            yield self.offer(os.getpid(), [Span(start, start + size)], alone=alone)

    def _offered(self, pages: int) -> Offered:
        reply, _ = self._hear(protocol.Offered)
        self.written = min(self.written, reply.written)  # bounds all answers
        slots = self._slots(reply.slots, pages)
        fresh = np.frombuffer(reply.fresh, np.bool_)
        if len(fresh) != len(slots):
            raise DaemonUnreachable("that is not sksmd: it miscounts")
        return slots, fresh, reply.refusal

    def status(self, *, reclaim: bool = False) -> protocol.Status:
        """Ask how things stand; with `reclaim`, after giving back what is dead."""
        return self._ask(protocol.Ask(reclaim), protocol.Status)[0]

    def supervise(self, listener: int) -> None:
        """Have calls answered, from now on, that come in by a listener.

        Args:
            listener: as `notify.listen` gives it.

        Raises:
            NotPermitted: the daemon may not stop this process; it says why.
            DaemonUnreachable: as all that asks it.
        """
        self._say(protocol.Supervise(), [listener])
        try:
            self._hear(protocol.Supervised)
        except DaemonUnreachable:
            raise
        except SksmError as error:
            raise NotPermitted(str(error)) from error

    def give_back(self) -> None:
        """Free, now and not sometime, slots that nobody maps any more."""
        self.status(reclaim=True)

    def _slots(self, raw: bytes, pages: int) -> npt.NDArray[np.int64]:
        """Read slots, one a page. None lies behind the file's end: SIGBUS there."""
        size = os.fstat(self._pool).st_size
        if len(raw) != pages * 8:
            raise DaemonUnreachable("that is not sksmd: it miscounts")
        slots = np.frombuffer(raw, np.int64).copy()
        if pages and int(slots.max()) * PAGE_SIZE >= size:
            raise DaemonUnreachable("that is not sksmd: it names slots it has not")
        return slots

    def _ask(
        self, request: protocol.Request, kind: type[_R], fds: int = 0
    ) -> tuple[_R, list[int]]:
        """Send a request and take its answer; see `_hear`."""
        self._say(request)
        return self._hear(kind, fds)

    def _say(self, request: protocol.Request, fds: Sequence[int] = ()) -> None:
        try:
            protocol.send(self._connection, request, fds)
        except ConnectionError:  # it hung up, and may have said why before
            if self.alive():
                raise
        except TimeoutError as error:
            raise DaemonUnreachable(_SILENT) from error

    def _hear(self, kind: type[_R], fds: int = 0) -> tuple[_R, list[int]]:
        """Take an answer.

        Raises:
            ConnectionError: the daemon is gone.
            DaemonUnreachable: it does not answer, or not in this protocol.
            SksmError: it refused, and says why.
        """
        try:
            try:
                data, received = protocol.receive(self._connection, fds)
            except ConnectionError:
                if self.alive():
                    raise
                data, received = protocol.receive(self._connection)
            if not data:
                raise ConnectionResetError("the daemon hung up")
            reply = protocol.decode_reply(data)
        except TimeoutError as error:
            raise DaemonUnreachable(_SILENT) from error
        except (msgspec.MsgspecError, protocol.Malformed) as error:
            raise DaemonUnreachable(f"that is not sksmd: {error}") from error
        if isinstance(reply, protocol.Failure):
            raise SksmError(f"sksmd refused: {reply.message}")
        if not isinstance(reply, kind):
            answer = type(reply).__name__
            raise DaemonUnreachable(f"sksmd answered out of turn: {answer}")
        return reply, received


def _share_lock(pool: int) -> None:
    """Lock the pool for reading; wait while the daemon reclaims, but not for ever."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return fcntl.flock(pool, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DaemonUnreachable(_SILENT) from None
            time.sleep(0.001)


def _let_read(daemon: int) -> None:
    """Name the daemon as our tracer where Yama asks for it, so it can read pages.

    Documentation/admin-guide/LSM/Yama.rst: with scope 1 only ancestors may, and
    those that a process names.
    """
    if permission.yama_scope() == 1:
        with contextlib.suppress(
            OSError
        ):  # EINVAL: Yama is not this kernel's after all
            libc.prctl(libc.PR_SET_PTRACER, daemon, 0, 0, 0)


@contextlib.contextmanager
def opened(whose: Domain) -> Iterator[Store]:
    """Open the store of a domain; one of our own if no daemon can be had."""
    store: RemoteStore | LocalStore
    try:
        store = RemoteStore(whose)
    except DaemonUnreachable:
        store = LocalStore()
    with contextlib.closing(store):
        yield store
