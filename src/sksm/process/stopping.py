"""Holding threads of another process still, for a millisecond or two."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

from sksm.linux import ptrace
from sksm.process import BUSY, status
from sksm.process.filters import Filters
from sksm.process.tracer import Tracer

# How long threads may take to stop. One in uninterruptible sleep (a disk, vfork)
# takes its time, and the others must not wait for it.
PATIENCE_SECONDS = 0.02
_MOST_ROUNDS = 50  # of listing and stopping threads, since new ones may be started
_SPINS = 200  # looks without a pause between: a thread that can stops in 20 us
_KERNEL_WORKER = 0x4010  # PF_USER_WORKER (vhost) and PF_IO_WORKER (io_uring)
_T = TypeVar("_T")


class Threads:
    """The threads of a process that we did not start.

    A thread is traced only while it is held: between two holds signals reach it
    as if we were not there. If we die, the kernel lets all of them run.

    What is done with held threads is done in the thread of ours that traces them
    (`Tracer`), so it is handed in as a function.
    """

    def __init__(self, pid: int, known_filters: int = 0) -> None:
        self.pid = pid
        self.filters = Filters(pid, known_filters)
        self.stops: list[float] = []  # seconds, each stop of all threads
        self._mem: int | None = None
        self._child = _of_status(pid, "PPid") == os.getpid()
        self._tracer = Tracer(pid, child=self._child)
        self._held: list[int] = []
        self.owed: dict[int, int] = {}  # signals that held threads are yet to have

    def hold_all(
        self, work: Callable[[list[int]], _T], patience_s: float | None = None
    ) -> _T:
        """Hold every thread, and return what `work` returns.

        Args:
            work: called with the threads, the main one first.
            patience_s: how long to wait for each, if not as long as usual.

        Raises:
            BlockingIOError: some thread would not stop, or cannot be attached to.
            ProcessLookupError: it has ended.
            PermissionError: no leave to trace it, or somebody else does.
        """

        def hold() -> _T:
            for _ in range(_MOST_ROUNDS):
                seized = [tid for tid in self._unheld() if self._seize(tid)]
                if not seized:
                    break
                self._stop(seized, patience_s)
            else:  # it starts threads faster than they are stopped
                raise BlockingIOError(errno.EBUSY, BUSY)
            if not self._held:
                raise _gone()
            return work(self._held)

        started = time.perf_counter()
        try:
            return self._run(hold)
        finally:
            self.stops.append(time.perf_counter() - started)

    def hold_one(self, work: Callable[[int], _T]) -> _T:
        """Hold one thread, whichever can be, and return what `work` returns.

        Raises:
            As `hold_all`.
        """

        def hold() -> _T:
            for tid in self._unheld():
                if self._seize(tid):
                    with contextlib.suppress(BlockingIOError):
                        self._stop([tid])
                if self._held:
                    return work(self._held[0])
            raise BlockingIOError(errno.EBUSY, BUSY)

        return self._run(hold)

    def _run(self, hold: Callable[[], _T]) -> _T:
        """Run what holds threads, and let go of all of them, held or not."""

        def held() -> _T:
            try:
                return hold()
            finally:
                self._let_go()

        try:
            return self._tracer.run(held)
        finally:
            if self._tracer.attached:  # to threads that ended, or did not stop
                self._tracer.release()

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
        """End the thread that traces, and close files."""
        self._tracer.release()
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
            if (seen := self.look(tid)) is None:
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
        """Return a thread's status (`ptrace.wait`); a child's end is for its parent.

        One that has vanished counts as ended. Either it was reaped in `Tracer.run`, or
        execve(2) gave it the main thread's number, under which we still trace it
        (ptrace(2), "execve(2) under ptrace") until the tracing thread ends.
        """
        try:
            return ptrace.wait(tid, reap=not self._child or tid != self.pid)
        except ChildProcessError:
            return 0

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
                self._tracer.attach(tid)
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
        return True

    def _stop(self, tids: list[int], patience_s: float | None = None) -> None:
        patience = () if patience_s is None else (patience_s,)
        asked = []
        for tid in tids:
            with contextlib.suppress(ProcessLookupError):
                ptrace.interrupt(tid)
                asked.append(tid)
        for tid in asked:
            if self.await_stop(tid, *patience):
                self._held.append(tid)

    def _let_go(self) -> None:
        for tid in self._held:
            with contextlib.suppress(ProcessLookupError):  # it has ended, or runs
                ptrace.detach(tid, self.owed.pop(tid, 0))
                self._tracer.attached.discard(tid)
        self._held.clear()


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
