"""What the tests of the daemon and of faults share: processes on strings."""

import contextlib
import mmap
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import msgspec
import numpy as np

import sksm
from sksm import session
from sksm.daemon import protocol
from sksm.daemon.client import RemoteStore
from sksm.errors import DaemonUnreachable
from sksm.linux import libc
from sksm.pages import BATCH_PAGES
from sksm.spans import PAGE_SIZE
from tests.conftest import Memory, poll


def content(seed, pages):
    """Give `pages` pages of bytes that depend on `seed` only, none of them zero."""
    generator = np.random.default_rng(seed)
    return generator.integers(1, 256, (pages, PAGE_SIZE), np.uint8)


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
    """sksmd started by hand, as a child: its options, limits and end are the test's."""

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
        poll(self._answers)

    def _answers(self):
        assert self.process.poll() is None, "the daemon did not start"
        with contextlib.suppress(DaemonUnreachable):
            return self.status()
        return None

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


class Deeds:
    """What a puppet can do. Memory goes by name; its shadow copy stays behind."""

    def __init__(self):
        self.memory, self.shadow = {}, {}

    def fill(self, name, seed, pages):
        self.memory[name] = Memory(pages)
        self.shadow[name] = content(seed, pages)
        self.memory[name].rows[:] = self.shadow[name]

    def put(self, name, rows):
        """Have memory of that name hold these bytes, from the start of a batch."""
        self.memory[name] = memory = Memory(len(rows) + BATCH_PAGES)
        skipped = -memory.span.start // PAGE_SIZE % BATCH_PAGES
        memory.rows = memory.rows[skipped : skipped + len(rows)]
        memory.rows[:] = self.shadow[name] = rows

    def merge(self, name):
        report = sksm.merge(self.memory[name].rows)
        return {k: v for k, v in report.as_dict().items() if v and k != "seconds"}

    def unmerge(self, name):
        sksm.unmerge(self.memory[name].rows)

    def intact(self, name):
        return bool((self.memory[name].rows == self.shadow[name]).all())

    def write(self, name, first, stop):
        """Change one byte of each of some pages."""
        for rows in (self.memory[name].rows, self.shadow[name]):
            rows[first:stop, 7] ^= 0xFF

    def drop(self, name):
        """Empty the page table of the range: MADV_DONTNEED."""
        span = self.memory[name].span
        libc.madvise(span.start, span.size, libc.MADV_DONTNEED)

    def protect(self, name, prot):
        libc.mprotect(self.memory[name].span.start, self.memory[name].span.size, prot)

    def move(self, name):
        """Move the range with mremap, in two steps."""
        span = self.memory[name].span
        half = span.pages // 2 * PAGE_SIZE
        spare = Memory(span.pages)
        for start, size in ((0, half), (half, span.size - half)):
            flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED
            at = spare.span.start + start
            libc.mremap(span.start + start, size, size, flags, at)
        hole = (span.start, span.size, 3, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | 0x10)
        libc.mmap(*hole, -1, 0)
        self.memory[name] = spare

    def take_lease(self):
        """Be in the middle of a merge from now on."""
        self.ask(protocol.Lookup(b"\0" * 8))
        self.lease = session.current._store.lease()  # given up when it is collected
        self.lease.__enter__()

    def ask(self, request):
        """Say something on the session's connection."""
        if session.current._store is None:
            session.current._store = RemoteStore()
        store = session.current._store
        return type(store._ask(request, msgspec.Struct)[0]).__name__

    def daemon(self):
        """Connect, starting a daemon if there is none, and give its pid."""
        store = RemoteStore()
        with contextlib.closing(store):
            return store.status().pid

    def pool_inode(self):
        """Name the file that holds the pool of this process's daemon."""
        return os.fstat(session.current._store.pool).st_ino

    def hang_up(self):
        session.current.close()

    def fork(self, *, hidden=False):
        """Leave a child behind that only lives. It dies with its stop pipe."""
        near, far = os.pipe()
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(far)
            if hidden:
                self.hide()
            os.write(tell, b"x")
            os.read(near, 1)
            os._exit(0)
        os.read(ready, 1)
        for fd in (near, ready, tell):
            os.close(fd)
        self.stop = far
        return pid

    def fork_hidden(self):
        return self.fork(hidden=True)

    def end_child(self, pid):
        os.close(self.stop)
        os.waitpid(pid, 0)

    def hide(self):
        """Let nobody look at this process but root."""
        libc.prctl(libc.PR_SET_DUMPABLE, 0, 0, 0, 0)


class Puppet:
    """A forked process that does what it is told; an attribute is a deed."""

    def __init__(self):
        self._near, far = multiprocessing.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._near.close()
            _dance(far)
        far.close()
        self.alive = True

    def __getattr__(self, deed):
        def do(*args):
            self._near.send((deed, args))
            result = self._near.recv()
            if isinstance(result, str) and result.startswith("Traceback"):
                raise AssertionError(result)
            return result

        return do

    def end(self, how=signal.SIGKILL):
        """Kill it, and wait for its end."""
        if self.alive:
            os.kill(self.pid, how)
            os.waitpid(self.pid, 0)
            self._near.close()
            self.alive = False


def _dance(strings):
    deeds = Deeds()
    try:
        while True:
            deed, args = strings.recv()
            try:
                strings.send(getattr(deeds, deed)(*args))
            except BaseException:
                strings.send(traceback.format_exc())
    finally:
        os._exit(0)


def start_child(function):
    """Run `function` in a forked child; it exits with 0, or 1 after a traceback."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(110)  # a hang ends, too
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


def pool_mappings():
    """Count this process's mappings of any pool."""
    return Path("/proc/self/maps").read_text().count("memfd:sksm-pool")


def anonymous_pages(pages):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return mmap.mmap(-1, pages * PAGE_SIZE, flags=flags)
