"""Running a program below us, where the kernel lets only ancestors look at processes.

With Yama's scope 1 (Documentation/admin-guide/LSM/Yama.rst) a process without
privilege may trace its descendants, and nobody else. So the program does not take our
place there, with a child of the daemon's to answer its calls. Instead we have

    stand-in     our own process: passes signals on, stops and ends as the program does
      tracer     answers, until nobody is left who might call
        waiter   tells the stand-in how the program stopped, or ended
          program

Who is left behind when its parent ends becomes a child of the tracer's
(PR_SET_CHILD_SUBREAPER), and so stays its descendant.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from sksm import running, stand_in
from sksm.daemon import launch, supervisor
from sksm.errors import SksmError
from sksm.linux import libc

_LONGEST = 1 << 16  # bytes of a message
_KILLED = "the process that was to start the program was killed"


def run(command: Sequence[str]) -> NoReturn:
    """Run a program with MADV_MERGE below this process, and end as it does.

    Raises:
        SksmError: as `running.listen`; or nobody may trace the program.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    here, above = _line()
    _fork(here, _trace, above, command, mask)
    above.close()
    try:
        _, program = _hear(here)
    except SksmError:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    fds = (here.fileno(), program)
    for fd in fds:
        os.set_inheritable(fd, True)
    words = ["-IS", stand_in.__file__, *map(str, fds), "--", *command]  # for ps(1)
    os.execv(sys.executable, [sys.executable, *words])


def _trace(
    above: socket.socket, command: Sequence[str], mask: Iterable[signal.Signals]
) -> None:
    """Have the program started, and answer its calls."""
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    here, below = _line()
    _fork(here, _wait, above, below, command, mask)
    below.close()
    try:
        pid, listener = _hear(here)
        known_filters = supervisor.known_filters(pid)
        socket.send_fds(above, [b"%d" % pid], [os.pidfd_open(pid)])
    except SksmError as error:
        above.send(pickle.dumps(error))
        return
    _leave_terminal()
    here.send(b".")
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    supervisor.supervise(listener, known_filters)


def _leave_terminal() -> None:
    """Go to the background, and hold nothing that others wait for the end of."""
    os.setsid()
    os.chdir("/")
    with launch.log() as log, open(os.devnull, "r+b") as null:
        for fd, file in enumerate((null, log, log)):
            os.dup2(file.fileno(), fd)


def _wait(
    above: socket.socket,
    below: socket.socket,
    command: Sequence[str],
    mask: Iterable[signal.Signals],
) -> None:
    """Start the program, and tell above what becomes of it. With that, it ends."""
    pid = _fork(above, _become, below, command, mask)
    below.close()
    stand_in.wake_by_signal(above)
    while True:
        signal.sigwait((signal.SIGCHLD, signal.SIGIO))
        while (found := os.waitpid(pid, os.WNOHANG | os.WUNTRACED))[0]:
            with contextlib.suppress(OSError):  # nobody wants to know
                above.send(stand_in.STATUS.pack(found[1]))
            if not os.WIFSTOPPED(found[1]):
                return
        with contextlib.suppress(BlockingIOError):
            if not above.recv(1):  # the stand-in was killed, and means the program
                os.kill(pid, signal.SIGKILL)


def _become(
    line: socket.socket, command: Sequence[str], mask: Iterable[signal.Signals]
) -> None:
    """Become the program, as soon as somebody answers its calls."""
    try:
        listener = running.listen()
    except SksmError as error:
        line.send(pickle.dumps(error))
    else:
        socket.send_fds(line, [b"%d" % os.getpid()], [listener])
        os.close(listener)
    if line.recv(1):  # else the tracer has told why not, and ended
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        running.execute(command)


def _line() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _hear(line: socket.socket) -> tuple[int, int]:
    """Take the number of a process, and a descriptor with it; or raise the error."""
    message, fds, _, _ = socket.recv_fds(line, _LONGEST, 1)
    if fds:
        return int(message), fds[0]
    told = message.startswith(pickle.PROTO)  # else it says how it ended
    raise pickle.loads(message) if told else SksmError(_KILLED)


def _fork(ours: socket.socket, role: Callable[..., None], *args: object) -> int:
    """Start a process that does no more than `role(*args)`; gives its number.

    It does not get the socket `ours`, by whose end others learn of ours.
    """
    if pid := os.fork():
        return pid
    try:
        ours.close()
        role(*args)
    except BaseException:
        traceback.print_exc()
    os._exit(1)
