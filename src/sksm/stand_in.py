"""Stand in for a program that runs below us: pass signals on, stop and end as it does.

A program of its own, `python -IS stand_in.py SOCKET PIDFD -- CMD...`: it has one
thread, where the libraries of the command have left some that take signals, and
little memory. Whoever waits for the program tells on the socket how that stopped and
how it ended (waitpid(2)), in four bytes each. CMD is there for those who look.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import socket
import struct
import sys

STATUS = struct.Struct("<i")


def wake_by_signal(line: socket.socket) -> None:
    """Have SIGIO sent to this process when there is something to read."""
    fcntl.fcntl(line, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(line, fcntl.F_GETFL)
    fcntl.fcntl(line, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    os.kill(os.getpid(), signal.SIGIO)  # for what came before


def main(line: socket.socket, program: int) -> None:
    """Do so until the program has ended. All signals have to be blocked."""
    wake_by_signal(line)
    while True:
        told = signal.sigwaitinfo(signal.valid_signals())
        if told.si_signo == signal.SIGIO:
            with contextlib.suppress(BlockingIOError):
                while True:
                    _do_as_it_did(line.recv(STATUS.size))
        # What the kernel sends (a terminal's keys) the program gets, too.
        elif told.si_code <= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(program, told.si_signo)


def _do_as_it_did(message: bytes) -> None:
    if not message:
        sys.exit("sksm: who waited for the program was killed; it runs on")
    (status,) = STATUS.unpack(message)
    if os.WIFSTOPPED(status):
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it has left its own
    with contextlib.suppress(OSError):  # SIGKILL
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    os._exit(128 + number)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
