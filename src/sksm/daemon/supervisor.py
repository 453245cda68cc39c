"""MADV_MERGE for programs on a kernel that does not have it.

A filter makes their calls wait, and this answers them: it merges the range through
the ordinary pipeline, and says what the proposed kernel would. It runs in children of
the daemon, one for each `sksm run`, which share with it what memory Python takes; and
where only ancestors may trace, above the program (`ancestry`).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import gc
import logging
import os
import select
import signal
import time

from sksm.daemon import client
from sksm.engines.pool import PoolEngine
from sksm.errors import SksmError
from sksm.linux import libc, notify
from sksm.linux.notify import Notification
from sksm.pipeline import merge
from sksm.process import BUSY, domain, permission, status
from sksm.process.domain import Domain
from sksm.process.other import OtherProcess
from sksm.process.reading import IOV_MAX, read_bytes
from sksm.spans import PAGE_SIZE, Span
from sksm.store import Store

_TOP = 1 << 64
_BUSY_SECONDS = 2.0  # in which threads that would not stop are asked again
_AGAIN_SECONDS = 1.0  # in which a call that a stop broke off begins anew
_THE_CALLERS = (errno.EBADF, errno.EFAULT)  # mistakes, which the answer tells it
_IDLE_MS = 200  # after which memory is given back that merging took
_LISTENER = 3  # where it lies in a process that does nothing else
_log = logging.getLogger(__name__)


def supervise(listener: int, known_filters: int) -> None:
    """Answer calls until nobody is left who might make one. Closes all else."""
    gc.freeze()  # what is the daemon's, too: to look through it would be to copy it
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    # The kernel buries whom programs leave to us, if we are their ancestor.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.dup2(listener, _LISTENER, inheritable=False)
    os.closerange(_LISTENER + 1, os.sysconf("SC_OPEN_MAX"))
    supervisor = Supervisor(_LISTENER, known_filters)
    waiting = select.poll()
    waiting.register(_LISTENER, select.POLLIN)
    with contextlib.closing(supervisor):
        # POLLHUP: the last of them has ended.
        while all(event & select.POLLIN for _, event in waiting.poll()):
            supervisor.serve_one()
            if not waiting.poll(_IDLE_MS):
                libc.trim()


def known_filters(pid: int) -> int:
    """Count the filters of a process that are ours: the one that it has, or none.

    Raises:
        SksmError: we may not trace it, or it has ended.
    """
    try:
        with open(f"/proc/{pid}/mem", "rb"):  # asks what ptrace(2) asks
            return 1 if status.read(pid).get("Seccomp_filters") == "1" else 0
    except OSError as error:
        raise permission.explain(pid, error) from error


@dataclasses.dataclass(frozen=True, slots=True)
class _Done:
    """A call that was carried out while it waited no longer."""

    number: int
    args: tuple[int, ...]
    result: int
    when: float


class Supervisor:
    """Answers the calls of programs under one listener, one after the other.

    A stop breaks off the wait of the thread that calls, and the kernel begins its
    call anew: then the answer is there already.

    Args:
        listener: as `notify.listen` gives it.
        known_filters: that are on the programs by us, and harmless.
    """

    def __init__(self, listener: int, known_filters: int) -> None:
        self._listener, self._filters = listener, known_filters
        self._scope = contextlib.ExitStack()
        self._stores: dict[Domain, Store] = {}
        self._done: dict[int, _Done] = {}  # by thread
        self._store(Domain(os.getuid()))  # at once: it will be needed

    def close(self) -> None:
        """Let go of the stores. Calls that wait get ENOSYS with the listener's end."""
        self._scope.close()
        self._stores.clear()

    def serve_one(self) -> None:
        """Take the next call that waits, if there is one, and see it answered."""
        call = notify.receive(self._listener)
        if call is None:
            return
        done = self._done.pop(call.tid, None)
        if done is None or not _same(done, call):
            try:
                result = self._carry_out(call)
            except Exception:  # a fault of ours must not leave all others unanswered
                _log.exception("process of thread %d", call.tid)
                result = -errno.EAGAIN
            done = _Done(call.number, call.args, result, time.monotonic())
        if not notify.answer(self._listener, call, done.result):
            self._done[call.tid] = done

    def _carry_out(self, call: Notification) -> int:
        try:
            pid = _process_of(call.tid)
            if not notify.waits(self._listener, call):  # the number may be another's
                return -errno.EINTR
            if call.number == libc.SYS["madvise"]:
                return self._merge(pid, *call.args[:2])
            pidfd, vectors, count, _advice, flags, _ = call.args
            return self._merge_of(pid, pidfd, vectors, 0 if flags else count)
        except ProcessLookupError:
            return -errno.ESRCH
        except OSError as error:
            if error.errno not in _THE_CALLERS:
                _log.warning("process of thread %d: %s", call.tid, error)
            return -(error.errno or errno.EAGAIN)
        except SksmError as error:
            _log.warning("process of thread %d: %s", call.tid, error)
            return -errno.EAGAIN

    def _merge(self, pid: int, address: int, length: int) -> int:
        """Do what madvise(2) would, with MADV_MERGE."""
        size = -(-length // PAGE_SIZE) * PAGE_SIZE
        if address % PAGE_SIZE or size >= _TOP or address + size > _TOP:
            return -errno.EINVAL
        if not size:
            return 0
        span = Span(address, address + size)
        store = self._store(domain.of(pid))
        space = OtherProcess(pid, self._filters, tails=True)
        deadline = time.monotonic() + _BUSY_SECONDS
        with space, store.granted():
            try:
                report = merge(space, span, engine=PoolEngine(store))
                while BUSY in report.reasons and time.monotonic() < deadline:
                    report = merge(space, span, engine=PoolEngine(store))
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                return -errno.ENOMEM
        _log.info("process %d: %s", pid, report)
        return 0

    def _merge_of(self, pid: int, pidfd: int, vectors: int, count: int) -> int:
        """Do what process_madvise(2) would; gives how many bytes were advised."""
        if not 0 < count <= IOV_MAX:
            return -errno.EINVAL
        other = _process_behind(pid, ctypes.c_int(pidfd).value)
        if domain.of(other) != domain.of(pid):
            return -errno.EPERM
        pieces = (libc.iovec * count).from_buffer_copy(
            read_bytes(pid, vectors, count * ctypes.sizeof(libc.iovec))
        )
        advised = 0
        for piece in pieces:
            result = self._merge(other, piece.iov_base or 0, piece.iov_len)
            if result < 0:
                return advised or result
            advised += piece.iov_len
        return advised

    def _store(self, whose: Domain) -> Store:
        if whose not in self._stores or not self._stores[whose].alive():
            self._stores[whose] = self._scope.enter_context(client.opened(whose))
        return self._stores[whose]


def _same(done: _Done, call: Notification) -> bool:
    fresh = time.monotonic() - done.when < _AGAIN_SECONDS
    return fresh and (done.number, done.args) == (call.number, call.args)


def _process_of(tid: int) -> int:
    try:
        return int(status.read(tid)["Tgid"])
    except FileNotFoundError as error:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error


def _process_behind(pid: int, pidfd: int) -> int:
    """Find the process that a pidfd of process `pid` means, in /proc/PID/fdinfo.

    Raises:
        OSError: EBADF if it is none, ESRCH if that one has ended.
    """
    try:
        with open(f"/proc/{pid}/fdinfo/{pidfd}") as lines:
            for line in lines:
                if line.startswith("Pid:"):
                    if (other := int(line.split()[1])) > 0:
                        return other
                    raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    except FileNotFoundError:
        pass
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
