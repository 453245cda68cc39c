"""Starting a program that may call MADV_MERGE, and staying with it to its end."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from sksm.errors import NotPermitted, Unsupported
from sksm.linux import libc, notify
from sksm.linux.trials import page
from sksm.process import status
from sksm.supervisor import Supervisor

CANNOT_EXECUTE, NOT_FOUND = 126, 127  # as shells have them
_SIGNALLED = 128
# A terminal sends these to all of its foreground processes, the program among them.
# What somebody sends to us alone is meant for it.
_FORWARDED = set(signal.Signals) - {
    *(signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGCONT),
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP),
}
_STOPS = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


def execute(command: Sequence[str]) -> NoReturn:
    """Become a program, or end as shells do where that cannot be."""
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        print(f"sksm: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        os._exit(NOT_FOUND if missing else CANNOT_EXECUTE)


def run(command: Sequence[str]) -> int:
    """Run a program, answering its calls of MADV_MERGE; gives its exit status.

    As shells tell it: 128 and the number of the signal that ended it. What it has
    started and leaves behind goes on being answered, by a process of its own, which
    ends with the last of them.

    Raises:
        Unsupported, NotPermitted: the kernel does not let us listen.
    """
    near, far = socket.socketpair()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    pid = os.fork()
    if pid == 0:
        near.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _begin(command, far)
    far.close()
    with near:
        listener = _listener(near, pid)
    known = 1 if status.read(os.getpid()).get("Seccomp_filters", "0") == "0" else 0
    supervisor = Supervisor(listener, known)
    threading.Thread(target=_forward, args=(pid,), daemon=True).start()
    try:
        code = _stay(supervisor, listener, pid)
    finally:
        supervisor.close()
    if _in_use(listener) and os.fork() == 0:
        _stay_behind(listener, known)
    os.close(listener)
    return code


def _begin(command: Sequence[str], line: socket.socket) -> NoReturn:
    """In the child: put the filter on, hand its listener over, become the program."""
    try:
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        listener = notify.listen()
        socket.send_fds(line, [b"."], [listener])
        os.close(listener)
    except OSError as error:
        line.send(error.errno.to_bytes(2, "little") if error.errno else b"\0\0")
        os._exit(1)
    line.close()
    execute(command)


def _listener(line: socket.socket, pid: int) -> int:
    said, fds, _, _ = socket.recv_fds(line, 2, 1)
    if fds:
        return int(fds[0])
    os.waitpid(pid, 0)
    code = int.from_bytes(said, "little")
    if code == errno.EBUSY:
        raise Unsupported(
            "a supervisor of system calls is here already, and not one of ours: "
            "the kernel allows one (seccomp(2), SECCOMP_FILTER_FLAG_NEW_LISTENER)"
        )
    kind = NotPermitted if code in (errno.EPERM, errno.EACCES) else Unsupported
    why = os.strerror(code)
    raise kind(f"no listening to system calls: {why} (seccomp, Linux 5.0)")


def answered() -> bool:
    """Say whether MADV_MERGE is answered here already: by the kernel, or another us."""
    with page() as span, contextlib.suppress(OSError):
        # SAFETY: an advice that keeps contents, on a page of our own.
        libc.madvise(span.start, span.size, libc.MADV_MERGE)
        return True
    return False


def _forward(pid: int) -> None:
    """Pass on to the program what somebody sends us."""
    while True:
        info = signal.sigwaitinfo(_FORWARDED)
        if info.si_code <= 0:  # somebody's, by kill(2) or the like
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, info.si_signo)
        elif info.si_signo in _STOPS:  # the terminal's: the program has it, too
            os.kill(os.getpid(), signal.SIGSTOP)


def _stay(supervisor: Supervisor, listener: int, pid: int) -> int:
    ended = os.pidfd_open(pid)
    waiting = select.poll()
    waiting.register(ended, select.POLLIN)
    waiting.register(listener, select.POLLIN)
    try:
        while True:
            ready = dict(waiting.poll())
            if ready.get(listener, 0) & select.POLLIN:
                supervisor.serve_one()
            elif listener in ready:  # nobody is under the filter any more
                waiting.unregister(listener)
            elif ended in ready:
                _, how = os.waitpid(pid, 0)
                code = os.waitstatus_to_exitcode(how)
                return code if code >= 0 else _SIGNALLED - code
    finally:
        os.close(ended)


def _in_use(listener: int) -> bool:
    state = select.poll()
    state.register(listener, select.POLLIN)
    return not any(event & select.POLLHUP for _, event in state.poll(0))


def _stay_behind(listener: int, known: int) -> NoReturn:
    """Answer those who outlive the program, out of everybody's way."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    supervisor = Supervisor(listener, known)
    waiting = select.poll()
    waiting.register(listener, select.POLLIN)
    try:
        while all(event & select.POLLIN for _, event in waiting.poll()):
            supervisor.serve_one()
    finally:
        supervisor.close()
        os._exit(0)
