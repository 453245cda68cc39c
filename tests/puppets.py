"""Processes on strings: forked, told what to do with memory of theirs, killed."""

import contextlib
import multiprocessing
import os
import signal
import traceback

import msgspec

import sksm
from sksm import session
from sksm.daemon import protocol
from sksm.daemon.client import RemoteStore
from sksm.linux import libc
from sksm.pages import BATCH_PAGES
from sksm.spans import PAGE_SIZE
from tests.conftest import Memory
from tests.support import content


class Deeds:
    """What a puppet can do. Memory goes by name; its shadow copy stays behind."""

    def __init__(self):
        self.memory, self.shadow = {}, {}

    def fill(self, name, seed, pages):
        self.memory[name] = Memory(pages)
        self.shadow[name] = content(seed, pages)
        self.memory[name].rows[:] = self.shadow[name]

    def address(self, name):
        return self.memory[name].address

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
