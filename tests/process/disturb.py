"""What can be done to a running process; none of it may be noticed by it."""

import contextlib
import os
import signal
import time

from sksm.linux import ptrace
from tests.conftest import poll
from tests.process.programs import threads_of

# Calls that the kernel ends with EINTR whenever their thread was stopped, by anybody:
# signal(7), "Interruption of system calls and library functions by stop signals".
EINTR_BY_ANY_STOP = {
    "epoll_wait",
    "epoll_pwait",
    "semtimedop",
    "sigtimedwait",
    "sigwaitinfo",
    "recv_timeout",
}


def stop_threads(target):
    """Stop each thread for a moment, one after the other, as a tracer does."""
    deadline = time.monotonic() + 20
    for tid in threads_of(target.pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended
            ptrace.seize(tid)
            ptrace.interrupt(tid)
            while not _let_go(tid, target.pid):
                assert time.monotonic() < deadline, target.states()


def _let_go(tid, pid):
    """Let a thread go on if it has stopped; whether it did, or ended.

    A signal that was on its way is passed on. A thread that executed a program is
    the main thread by now, and has its number; the old main thread is no more.
    """
    traced = [number for number in {tid, pid} if _is_ours(pid, number)]
    for number in traced:
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            kinds = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT | ptrace.WALL
            seen = os.waitid(os.P_PID, number, kinds)
            if seen and seen.si_code in (os.CLD_TRAPPED, os.CLD_STOPPED):
                _, status = os.waitpid(number, ptrace.WALL)
                if ptrace.event(status) == ptrace.PTRACE_EVENT_STOP:
                    ptrace.detach(number)
                else:
                    ptrace.resume(number, os.WSTOPSIG(status))
            elif seen and number != pid:  # execve waits until we know of its end
                os.waitpid(number, ptrace.WALL)
            elif seen:
                return True  # the process: whoever started it wants to know
    return not traced


def _is_ours(pid, tid):
    """Say whether a thread is traced by this process."""
    path = f"/proc/{pid}/task/{tid}/status"
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(path) as it:
        return f"TracerPid:\t{os.getpid()}\n" in it
    return False


def stop_process(target):
    """Stop all threads for a moment, as a shell's job control does."""
    poll(lambda: _stopped(target))
    os.kill(target.pid, signal.SIGCONT)


def _stopped(target):
    os.kill(target.pid, signal.SIGSTOP)  # again if execve took the first one away
    seen = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, target.pid, seen)
