"""This process's way to the store: one connection, made when first needed."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator

import psutil

from sksm import pages
from sksm.daemon.client import RemoteStore
from sksm.engines.pool import PoolEngine
from sksm.errors import DaemonUnreachable, NotPermitted, SksmError
from sksm.linux import maps
from sksm.pipeline import merge
from sksm.process import EXCHANGE_PAGES
from sksm.process.local import ThisProcess
from sksm.report import MergeReport
from sksm.spans import PAGE_SIZE, Span

_STEP = EXCHANGE_PAGES * PAGE_SIZE
_PAUSES = (0.0, 0.01, 0.1)  # seconds before connecting again


class Session:
    """Merges memory of this process, one call at a time.

    After a fork the child starts with a session of its own: a connection, like a
    grant of slots, belongs to the process that opened it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None  # the thread that has it
        self._store: RemoteStore | None = None
        self._pid = os.getpid()

    def merge(
        self, span: Span, *, pinned: bool, never_drops: bool = False
    ) -> MergeReport:
        """Merge `span`; a daemon that died since the last time is replaced.

        Args:
            span: pages of this process.
            pinned: see `ThisProcess`.
            never_drops: see `AddressSpace`.

        Raises:
            OSError: ENOMEM for a hole in the range.
            SksmError: what stood in the way, and what would help.
        """
        with self._alone():
            # More than once: one that is being killed lets go of its clients
            # before it lets go of its socket.
            for pause in _PAUSES:
                try:
                    return self._merge(span, pinned, never_drops)
                except ConnectionError:
                    time.sleep(pause)
            try:
                return self._merge(span, pinned, never_drops)
            except ConnectionError as error:
                raise DaemonUnreachable(f"sksmd keeps dying: {error}") from error

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads out; a call inside a call would wait for itself.

        Raises:
            SksmError: the same thread is inside already, in a signal handler.
        """
        if self._holder == threading.get_ident():
            raise SksmError(
                "a merge of this thread is under way: a signal handler cannot begin "
                "another. Note the signal, and merge when it is done."
            )
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    def unmerge(self, span: Span) -> int:
        """Give the merged pages of `span` private memory again; how many bytes.

        Raises:
            SksmError: there is not enough memory, and everything is as it was; or
                what stood in the way of going on.
        """
        try:
            with self._alone(), ThisProcess(pinned=True) as space:
                freed = self._unmerge(space, span)
                if self._store is not None:
                    self._store.let_go()
                return freed
        except OSError as error:
            raise (_explain(error, pinned=True) or error) from error

    @staticmethod
    def _unmerge(space: ThisProcess, span: Span) -> int:
        merged = [m for m in maps.every_mapping("self") if pages.is_pool(m)]
        parts = [(mapping.span & span, mapping.prot) for mapping in merged]
        wanted = sum(part.size for part, _ in parts)
        available = psutil.virtual_memory().available
        if wanted > available:
            raise SksmError(
                f"un-merging needs {wanted} bytes of memory, and only "
                f"{available} are available"
            )
        for part, prot in parts:
            for start in range(part.start, part.stop, _STEP):
                piece = Span(start, min(start + _STEP, part.stop))
                space.privatise(piece, prot)
        return wanted

    def _merge(self, span: Span, pinned: bool, never_drops: bool) -> MergeReport:
        try:
            if self._pid != os.getpid():  # forked behind the interpreter's back
                self.close()
                self._pid = os.getpid()
            if self._store is not None and not self._store.alive():
                self.close()  # what lies in the pool it left is shared with nobody new
            if self._store is None:
                self._store = RemoteStore()
            whole = ThisProcess(pinned=pinned, never_drops=never_drops)
            with whole as space, self._store.granted():
                return merge(space, span, engine=PoolEngine(self._store))
        except BaseException as error:
            self.close()  # an answer may be under way: no place for questions
            if isinstance(error, OSError) and (explained := _explain(error, pinned)):
                raise explained from error
            raise

    def close(self) -> None:
        """Hang up. What was merged stays merged."""
        if self._store is not None:
            self._store.close()
            self._store = None


def _explain(error: OSError, pinned: bool) -> SksmError | None:
    """Turn an errno into words; None for a daemon that died, and for a hole."""
    if isinstance(error, ConnectionError):
        return None
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return SksmError("the table of open files is full: raise `ulimit -n`")
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermitted(
            f"{error}. A process that is not dumpable (prctl PR_SET_DUMPABLE) cannot "
            "look at its own pages."
        )
    if error.errno == errno.ENOMEM and not pinned:
        return None  # part of the range is not mapped
    return SksmError(f"the kernel refused what has to be done: {error}")


current = Session()


def _start_afresh() -> None:
    """In a forked child: leave the parent's connection and lock alone."""
    global current  # noqa: PLW0603
    current.close()
    current = Session()


os.register_at_fork(after_in_child=_start_afresh)
