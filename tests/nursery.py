"""Daemons and puppets of the tests, forked from a process that has imported everything.

A daemon that is started as users have it (`launch._spawn`) spends a quarter of a second
of processor time on its imports, and so does any program that uses sksm; the suite
starts hundreds. Here one process for each worker imports them once, before any test,
and forks daemons and puppets (tests/puppets.py) on request. What tests about starting,
and about what a daemon inherits or takes, have the mark `own_start`.

What it forks has nothing of the test process: no memory, descriptor or thread.
"""

import contextlib
import fcntl
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from sksm.daemon import launch
from sksm.daemon.client import RemoteStore

_LONGEST = 1 << 16
_HIGH = 500  # the first of some descriptors that nothing uses


class Way:
    """The way to a nursery. Puppets and forked children may go it, too."""

    def __init__(self, path):
        self.path = path

    def _ask(self, fds, *words):
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        line.connect(self.path)
        socket.send_fds(line, [json.dumps(words).encode()], fds)
        return line

    def spawn(self, listener, domain):
        """Take the place of `launch._spawn`."""
        words = [*([f"--domain={domain.name}"] if domain else []), "--detach"]
        with launch.log(domain) as log:
            fds = [listener.fileno(), log.fileno()]
            with self._ask(fds, "daemon", launch._environment(), words) as line:
                assert line.recv(1) == b".", "the nursery could not fork a daemon"

    def fork(self, fd, *, own_start, by_gain):
        """Have a puppet forked that obeys at a socket.

        Returns:
            Its pid, a pidfd, and a socket on which its exit status comes when it ends:
            it is no child of this process.
        """
        how = {"own_start": own_start, "by_gain": by_gain, "path": self.path}
        line = self._ask([fd], "puppet", dict(os.environ), how)
        pid, fds, _, _ = socket.recv_fds(line, 16, 1)
        return int(pid), fds[0], line


class Nursery(Way):
    """That process, as the tests see it."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="sksm-nursery-")
        super().__init__(str(Path(self._folder.name, "socket")))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.path)
            listener.listen(64)
            # No child of ours: tests list these, and wait for them.
            started = subprocess.run(
                [sys.executable, "-m", "tests.nursery", str(listener.fileno())],
                cwd=Path(__file__).parents[1],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                check=True,
            )
            self._pid = int(started.stdout)

    def close(self):
        os.kill(self._pid, signal.SIGKILL)
        self._folder.cleanup()


def main(number):
    """Fork daemons and puppets until killed."""
    if pid := os.fork():
        print(pid, flush=True)
        return
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)
    import numpy.random  # noqa: F401, PLC0415  numpy imports it when it is first used

    import sksm.daemon.main  # noqa: PLC0415
    import sksm.daemon.server  # noqa: F401, PLC0415  what else a daemon imports
    import tests.library.actor  # noqa: PLC0415
    import tests.process.holder  # noqa: F401, PLC0415

    door = socket.socket(fileno=number)
    waiting = selectors.DefaultSelector()
    waiting.register(door, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is not door:  # a pidfd: that puppet has ended
                waiting.unregister(key.fileobj)
                _bury(key.fd, *key.data)
                continue
            line, _ = door.accept()
            data, fds, _, _ = socket.recv_fds(line, _LONGEST, 2)
            if not data:
                line.close()
                continue
            what, *words = json.loads(data)
            pid = os.fork()
            if pid == 0:
                _become(what, _keep(fds), *words)
            for fd in fds:
                os.close(fd)
            if what == "puppet":
                pidfd = os.pidfd_open(pid)
                waiting.register(pidfd, selectors.EVENT_READ, (pid, line))
                with contextlib.suppress(BrokenPipeError):
                    socket.send_fds(line, [str(pid).encode()], [pidfd])
                continue
            with line, contextlib.suppress(BrokenPipeError):
                if os.waitpid(pid, 0)[1] == 0:
                    line.send(b".")


def _bury(pidfd, pid, line):
    """Reap a puppet, and tell the test its exit status."""
    os.close(pidfd)
    with line, contextlib.suppress(BrokenPipeError):
        line.send(str(os.waitpid(pid, 0)[1]).encode())


def _keep(fds):
    """Close all descriptors but these and the standard ones; gives their new numbers.

    Python objects that refer to the others stay alive: nothing here returns.
    """
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, _HIGH) for fd in fds]
    os.closerange(3, _HIGH)
    low = [os.dup2(fd, number, inheritable=False) for number, fd in enumerate(high, 3)]
    os.closerange(_HIGH, _HIGH + len(high))
    return low


def _become(what, fds, environment, words):
    """Be a daemon or a puppet: nothing stays but what was imported."""
    os.environ.clear()
    os.environ.update(environment)
    code = 1
    try:
        (_daemon if what == "daemon" else _puppet)(words, *fds)
        code = 0
    finally:
        os._exit(code)


def _daemon(words, listener, log):
    from sksm.daemon.main import main as daemon  # noqa: PLC0415

    os.chdir("/")
    for fd in (1, 2):
        os.dup2(log, fd)
    os.close(log)
    daemon([f"--listen-fd={listener}", *words], standalone_mode=False)


def _puppet(how, line):
    from tests.puppets import obey  # noqa: PLC0415

    if not how["own_start"]:
        launch._spawn = Way(how["path"]).spawn
    if not how["by_gain"]:
        RemoteStore.upkeep_bytes = lambda _: 0
    obey(line)


if __name__ == "__main__":
    main(int(sys.argv[1]))
