"""Daemons of the tests, forked from a process that has imported everything.

A daemon that is started as users have it (`launch._spawn`) spends a quarter of a second
of processor time on its imports, and the suite starts hundreds. Here one process for
each worker imports them once, before any test, and forks daemons on request. What tests
about starting, and about what a daemon inherits or takes, have the mark `own_start`.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from sksm.daemon import launch

_LONGEST = 1 << 16


class Nursery:
    """That process, as the tests see it. Forked children may ask it, too."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="sksm-nursery-")
        self._path = str(Path(self._folder.name, "socket"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self._path)
            listener.listen(16)
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

    def spawn(self, listener, domain):
        """Take the place of `launch._spawn`."""
        words = [*([f"--domain={domain.name}"] if domain else []), "--detach"]
        request = json.dumps([words, launch._environment()]).encode()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line,
            launch.log(domain) as log,
        ):
            line.connect(self._path)
            socket.send_fds(line, [request], [listener.fileno(), log.fileno()])
            assert line.recv(1) == b".", "the nursery could not fork a daemon"

    def close(self):
        os.kill(self._pid, signal.SIGKILL)
        self._folder.cleanup()


def main(number):
    """Fork daemons until killed."""
    if pid := os.fork():
        print(pid, flush=True)
        return
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)
    from sksm.daemon import server  # noqa: F401, PLC0415  what else a daemon imports
    from sksm.daemon.main import main as daemon  # noqa: PLC0415

    door = socket.socket(fileno=number)
    while True:
        line, _ = door.accept()
        with line:
            data, fds, _, _ = socket.recv_fds(line, _LONGEST, 2)
            if not data:
                continue
            pid = os.fork()
            if pid == 0:
                door.close()
                line.close()
                _become(daemon, *json.loads(data), *fds)
            for fd in fds:
                os.close(fd)
            if os.waitpid(pid, 0)[1] == 0:
                with contextlib.suppress(BrokenPipeError):
                    line.send(b".")


def _become(daemon, words, environment, listener, log):
    """Be a daemon: of our own, nothing stays but what was imported."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir("/")
    for fd in (1, 2):
        os.dup2(log, fd)
    os.close(log)
    code = 1
    try:
        daemon([f"--listen-fd={listener}", *words], standalone_mode=False)
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
