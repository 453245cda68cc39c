"""A store that lives in the daemon, seen from a client."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import select
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
from sksm.store import UNSEEN, Offered, Store
from sksm.store.local import LocalStore

_R = TypeVar("_R", bound=protocol.Reply)
PATIENCE_SECONDS = 60.0  # for one answer; the daemon serves one client at a time
# As many slots as a grant may keep before the next call gets one of its own: it keeps
# all of them while one is mapped.
_SHARED_SLOTS = 1024
_SILENT = f"sksmd gave no answer in {PATIENCE_SECONDS:.0f} seconds"


@dataclasses.dataclass(slots=True)
class _Grant:
    """What this client was granted: a descriptor, and slots that it may map by it."""

    fd: int
    slots: int = 0  # of those that are settled
    answered: int = 0  # since then
    mapped: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    doubtful: bool = False


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
        self._grant: _Grant | None = None
        try:
            hello = protocol.Hello(protocol.VERSION)
            welcome, _ = self._ask(hello, protocol.Welcome)
        except BaseException:
            self._connection.close()
            raise
        self.seed, self.keeper = welcome.seed, welcome.pid
        self.name = welcome.pool
        # What only we may read of other processes, the daemon reads of us.
        self._reads_itself = permission.only_descendants()
        _let_read(welcome.pid)

    def close(self) -> None:
        """Hang up. What was merged stays merged."""
        self._connection.close()
        self.let_go()

    def let_go(self) -> None:
        """Keep no slot that is not mapped."""
        if self._grant is not None:
            os.close(self._grant.fd)
            self._grant = None

    def alive(self) -> bool:
        """Say whether the daemon holds its end of the line, asking it nothing."""
        line = select.poll()
        line.register(self._connection, select.POLLIN)
        return not line.poll(0)  # no hang-up, and no answer that nobody took

    @property
    def pool(self) -> int:
        """The pool's file, read-only, by the open file description of the grant."""
        assert self._grant is not None, "outside of `granted`"
        return self._grant.fd

    def pool_bytes(self) -> int:
        """Return how much memory the pool occupies."""
        return self.status().pool_bytes

    def upkeep_bytes(self) -> int:
        """Say what the daemon takes, if it would leave without us."""
        status = self.status()
        return 0 if status.slots else status.own_bytes

    @contextlib.contextmanager
    def granted(self) -> Iterator[None]:
        """Be able to map slots in the block.

        Small blocks in a row share a grant, so that the kernel joins the mappings made
        in them; and so does the memory that it keeps go when the last of them is gone.
        """
        if self._grant is None:
            _, fds = self._ask(protocol.Begin(), protocol.Granted, fds=1)
            if not fds:
                message = "no room for the pool's descriptor: raise ulimit -n"
                raise OSError(errno.EMFILE, message)
            self._grant = _Grant(fds[0])
        grant = self._grant
        try:
            yield
            self._settle(grant)
        except BaseException:
            grant.doubtful = True
            raise
        finally:
            if self._grant is grant and (grant.doubtful or grant.slots > _SHARED_SLOTS):
                self.let_go()

    def _settle(self, grant: _Grant) -> None:
        """Tell which slots are mapped, of those answered since the last time.

        Each time, so that both sides begin anew: what was told once must not count as
        not mapped the next time. Of a grant in doubt nothing is told, ever.
        """
        if grant.doubtful or not grant.answered:
            return
        told = sum(pages for _, pages in grant.mapped)
        many = len(grant.mapped) > protocol.MOST_PAGES // 2
        everything = many or told >= grant.answered
        runs = [] if everything else grant.mapped
        grant.slots += grant.answered if everything else told
        grant.answered, grant.mapped = 0, []
        packed = np.array(runs, np.int64).tobytes()
        self._say(protocol.Settle(packed, everything))

    def mapped(self, slot: int, pages: int) -> None:
        """Note that slots in a row have been mapped."""
        assert self._grant is not None
        self._grant.mapped.append((slot, pages))

    def in_doubt(self) -> None:
        """Keep all slots that were answered."""
        if self._grant is not None:
            self._grant.doubtful = True

    def lookup(self, prints: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Find each fingerprint's slot; `UNSEEN` where there is none."""
        reply, _ = self._ask(protocol.Lookup(prints.tobytes()), protocol.Slots)
        return self._slots(reply.slots, len(prints))

    def knows(self, prints: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Say which fingerprints have a slot just now."""
        request = protocol.Lookup(prints.tobytes(), only_asked=True)
        reply, _ = self._ask(request, protocol.Slots)
        found: npt.NDArray[np.bool_] = np.frombuffer(reply.slots, np.int64) != UNSEEN
        return found

    def claim(self, slot: int, pages: int) -> bool:
        """Ask for slots in a row."""
        reply, _ = self._ask(protocol.Claim(slot, pages), protocol.Claimed)
        if reply.given and self._grant is not None:
            self._grant.answered += pages
        return reply.given

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
        size = os.fstat(self.pool).st_size
        if len(raw) != pages * 8:
            raise DaemonUnreachable("that is not sksmd: it miscounts")
        slots = np.frombuffer(raw, np.int64).copy()
        if pages and int(slots.max()) * PAGE_SIZE >= size:
            raise DaemonUnreachable("that is not sksmd: it names slots it has not")
        assert self._grant is not None
        self._grant.answered += int((slots >= 0).sum())
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
