"""Holding threads of another process still, for a millisecond or two."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator

from sksm.linux import ptrace
from sksm.process import BUSY, status
from sksm.process.filters import Filters

# How long threads may take to stop. One in uninterruptible sleep (a disk, vfork)
# takes its time, and the others must not wait for it.
PATIENCE_SECONDS = 0.02
_LATE_SECONDS = 0.001  # to look for one that did not stop in time
_SETTLING_SECONDS = 5.0
_SPINS = 200  # looks without a pause between: a thread that can stops in 20 us
_KERNEL_WORKER = 0x4010  # PF_USER_WORKER (vhost) and PF_IO_WORKER (io_uring)


class Threads:
    """The threads of a process that we did not start.

    A thread is traced only while it is held: between two stops signals reach it
    as if we were not there. If we die, the kernel lets all of them run.
    """

    def __init__(self, pid: int, known_filters: int = 0) -> None:
        self.pid = pid
        self.filters = Filters(pid, known_filters)
        self.stops: list[float] = []  # seconds, each stop of all threads
        self._mem: int | None = None
        self._child = _of_status(pid, "PPid") == os.getpid()
        self._held: list[int] = []
        self._late: list[int] = []  # asked to stop, and have not yet
        self.owed: dict[int, int] = {}  # signals that held threads are yet to have

    @contextlib.contextmanager
    def all_stopped(self, patience_s: float | None = None) -> Iterator[list[int]]:
        """Hold every thread; gives them, the main one first.

        Args:
            patience_s: how long to wait for each, if not as long as usual.

        Raises:
            BlockingIOError: some thread would not stop; all run.
            ProcessLookupError: it has ended.
            PermissionError: no leave to trace it, or somebody else does.
        """
        self.settle(0.0)
        if self._late:
            raise BlockingIOError(errno.EBUSY, BUSY)
        started = time.perf_counter()
        try:
            while seized := [tid for tid in self._unheld() if self._seize(tid)]:
                self._stop(seized, patience_s)
            if not self._held:
                raise _gone()
            yield self._held
        finally:
            self._let_go()
            self.stops.append(time.perf_counter() - started)
            self.settle(0.0)

    @contextlib.contextmanager
    def one_stopped(self) -> Iterator[list[int]]:
        """Hold one thread, whichever can be: gives a list of one."""
        self.settle(0.0)
        try:
            for tid in self._unheld():
                if tid not in self._late and self._seize(tid):
                    with contextlib.suppress(BlockingIOError):
                        self._stop([tid])
                if self._held:
                    break
            if not self._held:
                raise BlockingIOError(errno.EBUSY, BUSY)
            yield self._held
        finally:
            self._let_go()
            self.settle(0.0)

    def settle(self, seconds: float) -> None:
        """Let go of threads that stopped after we had given up on them.

        Those that still have not are let go when this process ends.
        """
        deadline = time.monotonic() + seconds
        while self._late:
            for tid in list(self._late):
                with contextlib.suppress(BlockingIOError):
                    self._drop(tid)
            if time.monotonic() >= deadline:
                break

    def write(self, tid: int, address: int, data: bytes) -> None:
        """Write whole words, by way of a held thread, into memory it may not write.

        One call where the kernel lets /proc/PID/mem do so, else one a word.
        """
        with contextlib.suppress(OSError):
            if self._mem is None:
                self._mem = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            if os.pwrite(self._mem, data, address) == len(data):
                return
        ptrace.poke(tid, address, data)

    def close(self) -> None:
        """Let go of everything that is still held."""
        self.settle(_SETTLING_SECONDS)
        self.filters.close()
        if self._mem is not None:
            os.close(self._mem)
            self._mem = None

    def await_stop(self, tid: int, patience_s: float = PATIENCE_SECONDS) -> bool:
        """Wait until a thread that was interrupted is held; whether it is alive.

        A signal that it was about to take is delivered first, as the kernel would
        have done: the thread is then held at the first instruction of its handler.

        Raises:
            BlockingIOError: it has not stopped in time.
        """
        deadline = time.monotonic() + patience_s
        spins = 0
        while True:
            try:
                seen = self.look(tid)
            except ChildProcessError:
                self._follow(tid)
                return False
            if seen is None:
                if time.monotonic() > deadline:
                    raise BlockingIOError(errno.EBUSY, BUSY)
                spins += 1
                time.sleep(0 if spins < _SPINS else 0.0002)
            elif not os.WIFSTOPPED(seen):
                return False
            elif ptrace.event(seen) == ptrace.PTRACE_EVENT_STOP:
                return True
            else:  # any stop ends the interruption: ask for it again
                ptrace.interrupt(tid)
                ptrace.resume(tid, os.WSTOPSIG(seen))

    def look(self, tid: int) -> int | None:
        """Give a thread's status (`ptrace.wait`); a child's end is for its parent."""
        return ptrace.wait(tid, reap=not self._child or tid != self.pid)

    def _unheld(self) -> list[int]:
        try:
            tids = map(int, os.listdir(f"/proc/{self.pid}/task"))
        except FileNotFoundError as error:
            raise _gone() from error
        return [tid for tid in tids if tid not in self._held]

    def _seize(self, tid: int) -> bool:
        """Attach to a thread; whether it is one to be stopped."""
        # Execve may put a thread that lives in a dead one's place.
        for last in (False, True):
            try:
                ptrace.seize(tid)
            except ProcessLookupError:
                return False
            except PermissionError:
                state, flags = _state(self.pid, tid)
                if state in "ZX" or flags & _KERNEL_WORKER:
                    return False
                if last:
                    raise
            else:
                break
        self._late.append(tid)
        return True

    def _stop(self, tids: list[int], patience_s: float | None = None) -> None:
        patience = () if patience_s is None else (patience_s,)
        asked = []
        for tid in tids:
            with contextlib.suppress(ProcessLookupError):
                ptrace.interrupt(tid)
                asked.append(tid)
        for tid in asked:
            alive = self.await_stop(tid, *patience)
            self._late.remove(tid)
            if alive:
                self._held.append(tid)

    def _let_go(self) -> None:
        for tid in self._held:
            try:
                ptrace.detach(tid, self.owed.pop(tid, 0))
            except ProcessLookupError:  # it has ended, or runs: then it is still ours
                self._late.append(tid)
        self._held.clear()

    def _drop(self, tid: int) -> None:
        try:
            ptrace.interrupt(tid)
            if self.await_stop(tid, _LATE_SECONDS):
                ptrace.detach(tid)
        except ProcessLookupError:
            self._follow(tid)
        self._late.remove(tid)

    def _follow(self, tid: int) -> None:
        """Look after a thread that vanished: it may go by another number now.

        Execve gives the main thread's number to whichever thread calls it, and we
        trace that one still (ptrace(2), "execve(2) under ptrace").
        """
        known = tid == self.pid or self.pid in self._late
        if not known and _of_status(self.pid, "TracerPid") == threading.get_native_id():
            self._late.append(self.pid)


def _gone() -> ProcessLookupError:
    return ProcessLookupError(errno.ESRCH, "it has ended")


def _state(pid: int, tid: int) -> tuple[str, int]:
    """Read a thread's state and its PF_* flags (proc_pid_stat(5))."""
    try:
        fields = status.stat(pid, tid)
    except OSError:
        return "X", 0
    return fields[0], int(fields[6])


def _of_status(pid: int, name: str) -> int:
    """Read a number of /proc/PID/status; 0 if the process ended."""
    try:
        return int(status.read(pid)[name])
    except OSError:
        return 0
