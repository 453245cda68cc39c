"""What the tests of the daemon and of faults share: daemons, clients, children."""

import contextlib
import mmap
import os
import resource
import shutil
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import msgspec
import pytest

from sksm.daemon import protocol
from sksm.daemon.client import RemoteStore
from sksm.errors import DaemonUnreachable
from sksm.spans import PAGE_SIZE
from tests.conftest import poll


def mapped_bytes(inode):
    """Say how much of the memfd of that number all processes map together."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            for line in path.read_text(errors="replace").splitlines():
                if "memfd:sksm-pool" in line and line.split()[4] == str(inode):
                    start, stop = (int(word, 16) for word in line.split()[0].split("-"))
                    total += stop - start
    return total


class Daemon:
    """sksmd started by hand, as a child: its options, limits and end are the test's.

    An impatient one has a first client until `let_go()`, or it would have left
    before the test's own comes.
    """

    def __init__(self, runtime, idle=600.0, **popen):
        self.path = runtime / "sksmd.sock"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sksm.daemon", f"--idle={idle}"],
            env={**os.environ, "SKSM_RUNTIME_DIR": str(runtime)},
            stdin=subprocess.DEVNULL,
            **popen,
        )
        self.pid = self.process.pid
        self._runtime, self.watcher = runtime, None
        self._first = poll(self._connect)
        if idle >= 1:
            self.let_go()

    def _connect(self):
        assert self.process.poll() is None, "the daemon did not start"
        with contextlib.suppress(DaemonUnreachable):
            return RemoteStore(start=False)
        return None

    def let_go(self):
        """Hang up, as the first client."""
        self._first.close()

    def status(self, *, reclaim=False):
        store = RemoteStore(start=False)
        with contextlib.closing(store):
            return store.status(reclaim=reclaim)

    def fds(self):
        """List its open descriptors, by number."""
        return sorted(map(int, os.listdir(f"/proc/{self.pid}/fd")))

    def quiet_fds(self):
        """List its open descriptors once it has no client but one of ours."""
        if self.watcher is None:
            self.watcher = Raw(self._runtime)
            self.watcher.greet()
        poll(lambda: self.watcher.ask(protocol.Ask()).clients == 1)
        return self.fds()

    def limit(self, which, soft):
        """Set a soft limit of it; None lifts it as far as it goes."""
        _, hard = resource.prlimit(self.pid, which)
        resource.prlimit(self.pid, which, (hard if soft is None else soft, hard))

    def switches(self):
        """Say how often it has gone to sleep so far."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("voluntary"))

    def end(self):
        self.process.kill()
        self.process.wait()
        self.let_go()
        if self.watcher:
            self.watcher.socket.close()


class Raw:
    """A client that says what it likes."""

    def __init__(self, runtime):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(30)
        self.socket.connect(str(runtime / "sksmd.sock"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def say(self, message):
        if isinstance(message, msgspec.Struct):
            message = protocol.encode(message)
        self.socket.send(message)

    def hear(self):
        """Take an answer; None when the daemon hung up."""
        try:
            data, fds = protocol.receive(self.socket, 1)
        except ConnectionResetError:  # with something unread: answers may follow
            data, fds = protocol.receive(self.socket, 1)
        for fd in fds:
            os.close(fd)
        return protocol.decode_reply(data) if data else None

    def ask(self, message):
        self.say(message)
        return self.hear()

    def greet(self):
        return self.ask(protocol.Hello(protocol.VERSION))

    def begin(self):
        """Greet, and take a grant."""
        self.greet()
        return self.ask(protocol.Begin())


def start_child(function):
    """Run `function` in a forked child; it exits with 0, or 1 after a traceback."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def in_child(function):
    """Run `function` in a forked child; its failure is ours."""
    assert os.waitpid(start_child(function), 0)[1] == 0, "see the child's traceback"


def count_fds():
    return len(os.listdir("/proc/self/fd"))


def anonymous_pages(pages):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return mmap.mmap(-1, pages * PAGE_SIZE, flags=flags)


def compiled(path, source, *options, language="c", compiler="gcc"):
    """Compile `source` to the program or library at `path`; skip if nothing can."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    command = [compiler, "-o", path, f"-x{language}", "-", "-xnone", *options]
    done = subprocess.run(command, input=source, text=True, timeout=100)
    assert done.returncode == 0
    return path
