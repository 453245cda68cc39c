"""A thread of ours that traces the threads of one other process.

The kernel binds a tracee to the thread that attached to it, and PTRACE_SEIZE may wait
without an end, deaf to signals:

- for `cred_guard_mutex`. A thread in execve(2) holds it until its siblings are reaped
  (`de_thread` in fs/exec.c), and a sibling that is traced is reaped by its tracer: by
  us, who wait in PTRACE_SEIZE for the mutex;
- for a thread that is stopped by a signal and then frozen (cgroup freezer) to enter
  its tracing stop (`ptrace_attach` in kernel/ptrace.c).

So a thread of its own traces, and the one that asked waits for it, reaps what has to be
reaped meanwhile (wait(2) serves all threads of a process), and gives up when attaching
takes too long.

When a thread ends, the kernel lets go of all its tracees (`exit_ptrace`), also of those
that were asked to stop and have not stopped yet. That is how these are released.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import queue
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sksm.linux import ptrace

ATTACH_SECONDS = 1.0  # after which attaching is given up
UNATTACHABLE = "it cannot be attached to: it is frozen, or stuck in execve"
_LOOK_SECONDS = 0.01  # between two looks whether a traced thread has to be reaped
_T = TypeVar("_T")


class _Abandoned(BaseException):
    """Raised in a tracing thread whose call was given up: it must end at once."""


class _Call:
    """A function to be run by a tracing thread, and what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._finished: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        if not self.done:  # else it was handed over twice, because a signal came
            try:
                self.result = self._work()
            except _Abandoned:
                raise
            except BaseException as error:
                self.error = error
            self.done = True
        self._finished.put(None)

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(queue.Empty):
            self._finished.get(timeout=seconds)


class _Worker:
    """One tracing thread. It ends when told to, or when it was given up."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self.attaching_since: float | None = None  # time.monotonic()
        self.abandoned = False
        self.attached: set[int] = set()  # threads of the other process
        self._tid = 0
        # Not threading.Thread: a signal handler that raises in its `start` leaves it
        # in two minds. Nobody waits for a thread begun like this when we exit, which
        # ends the wait in PTRACE_SEIZE, too.
        _thread.start_new_thread(self._serve, ())

    def _serve(self) -> None:
        self._tid = _thread.get_native_id()
        with contextlib.suppress(_Abandoned):
            while (call := self.calls.get()) is not None:
                call.run()
                del call  # an error holds frames, and with them everything

    def lives(self) -> bool:
        """Say whether the kernel has the thread still, and with it its tracees."""
        return not self._tid or os.path.exists(f"/proc/self/task/{self._tid}")

    def attach(self, tid: int) -> None:
        self.attaching_since = time.monotonic()
        try:
            ptrace.seize(tid)
            self.attached.add(tid)
        finally:
            self.attaching_since = None
            if self.abandoned:
                raise _Abandoned

    def stuck(self) -> bool:
        since = self.attaching_since
        return since is not None and time.monotonic() > since + ATTACH_SECONDS

    def reap(self, sparing: int | None) -> None:
        """Reap traced threads that ended, while one waits in `attach`."""
        if self.attaching_since is None:
            return
        for tid in tuple(self.attached):
            if tid != sparing:
                with contextlib.suppress(ChildProcessError):
                    how = os.WEXITED | os.WNOHANG | ptrace.WALL
                    os.waitid(os.P_PID, tid, how)

    def end(self) -> None:
        """End the thread, and wait until the kernel has released its tracees."""
        self.calls.put(None)
        while self.lives():
            time.sleep(0)


# Threads that were given up in PTRACE_SEIZE, by the process they attach to: no other
# is sent after them.
_stuck: dict[int, _Worker] = {}
os.register_at_fork(after_in_child=_stuck.clear)


class Tracer:
    """Runs functions in a thread that may trace; see the module.

    Args:
        pid: the process whose threads are traced.
        child: it is our own child: its end is left for those who started it.
    """

    def __init__(self, pid: int, *, child: bool = False) -> None:
        self._pid, self._spared = pid, pid if child else None
        self._worker: _Worker | None = None

    def run(self, work: Callable[[], _T]) -> _T:
        """Run `work` in the tracing thread and return its result.

        Signal handlers of ours run in the main thread as ever. What they raise is
        raised here when `work` has ended.

        Raises:
            BlockingIOError: attaching to a thread of the process does not end.
        """
        if (lost := _stuck.get(self._pid)) is not None:
            if lost.lives():
                raise BlockingIOError(errno.EBUSY, UNATTACHABLE)
            del _stuck[self._pid]
        if self._worker is None:
            self._worker = _Worker()
        worker, call = self._worker, _Call(work)
        handed_over, interruption = False, None
        while not call.done:
            try:
                if not handed_over:
                    worker.calls.put(call)
                    handed_over = True
                call.wait(_LOOK_SECONDS)
                worker.reap(self._spared)
            except BaseException as raised:  # by a signal handler
                interruption = raised
            if worker.stuck():
                self._abandon(worker)
                raise BlockingIOError(errno.EBUSY, UNATTACHABLE) from interruption
        if interruption is not None:
            raise interruption
        if call.error is not None:
            raise call.error
        return call.result  # type: ignore[no-any-return]

    def attach(self, tid: int) -> None:
        """Become the tracer of a thread, which runs on. In `run` only."""
        assert self._worker is not None
        self._worker.attach(tid)

    @property
    def attached(self) -> set[int]:
        """The threads attached to. Who detaches one takes it out."""
        return self._worker.attached if self._worker else set()

    def release(self) -> None:
        """Have the kernel let go of all that is still traced. Not in `run`."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _abandon(self, worker: _Worker) -> None:
        worker.abandoned = True
        _stuck[self._pid] = worker
        self._worker = None
