"""Processes that do, step by step, what a test tells them, with memory of their own.

Puppets are for all that runs sksm or numpy: the nursery forks them, and so they import
nothing. What must look like somebody's program, with nothing of ours in it, is started:
a `Subject` (tests/process/subject.py).

What a puppet has from the nursery it shares with it, frame by frame. A test compares
only what the puppet has made itself.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import select
import signal
import traceback
from multiprocessing import reduction

import msgspec

import sksm
from sksm import session
from sksm.daemon.client import RemoteStore
from sksm.fingerprints import fingerprint
from sksm.linux import libc
from sksm.pages import BATCH_PAGES
from sksm.spans import PAGE_SIZE
from tests.rows import Memory, content


class Obedient:
    """What every puppet can do; a kind of puppet is a subclass, and adds its deeds."""

    line: multiprocessing.connection.Connection  # to the test

    def do(self, function, *args):
        """Call a function of a module, the test's for example."""
        return function(*args)

    def become(self, uid):
        """Be that user from now on, as a program of theirs that they may look at."""
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        # The kernel guards who gave up rights.
        libc.prctl(libc.PR_SET_DUMPABLE, 1, 0, 0, 0)

    def show(self):
        """Let everybody of this user look at it: the test is not above it (Yama)."""
        with contextlib.suppress(OSError):  # EINVAL without Yama
            libc.prctl(libc.PR_SET_PTRACER, 2**64 - 1, 0, 0, 0)

    def hide(self):
        """Let nobody look at this process but root."""
        libc.prctl(libc.PR_SET_DUMPABLE, 0, 0, 0, 0)

    def fork(self, *, hidden=False):
        """Leave a child behind that only lives. It dies with its stop pipe."""
        near, far = os.pipe()
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(far)
            self.line.close()
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

    def split(self):
        """Fork a child that obeys, too: `Puppet.split` sees to the rest."""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for it
        near, far = multiprocessing.Pipe()
        pid = os.fork()
        if pid == 0:
            near.close()
            self.line.close()
            try:
                serve(self, far)
            finally:
                os._exit(0)
        far.close()
        self.line.send((True, pid))
        with near:
            reduction.send_handle(self.line, near.fileno(), os.getppid())


class Deeds(Obedient):
    """Merges memory, which goes by name; its shadow copy stays behind."""

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

    def ask_for(self, name):
        """Ask for the slots of memory, as in the middle of a merge of equal memory."""
        if session.current._store is None:
            session.current._store = RemoteStore()
        store = session.current._store
        self.granted = store.granted()  # which ends when it is collected
        self.granted.__enter__()
        store.lookup(fingerprint(self.shadow[name], store.seed))

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
        with session.current._store.granted():
            return os.fstat(session.current._store.pool).st_ino

    def hang_up(self):
        session.current.close()


class Puppet:
    """A puppet as the test sees it; an attribute is a deed. `puppets` starts it.

    Args:
        fork: how: `Nursery.fork`.
        kind: a subclass of `Obedient` that a module has.
        args: for its constructor.
        how: for `fork`.
    """

    def __init__(self, fork, kind, *args, **how):
        self._near, far = multiprocessing.Pipe()
        with far:
            self.pid, self._pidfd, self._ends = fork(far.fileno(), **how)
        self.tell(kind, *args)
        self.hear()

    def __getattr__(self, deed):
        if deed.startswith("_"):
            raise AttributeError(deed)

        def do(*args, **named):
            self.tell(deed, *args, **named)
            return self.hear()

        return do

    def tell(self, deed, *args, **named):
        """Have it begin a deed."""
        self._near.send((deed, args, named))

    def hear(self):
        """Wait for the next answer."""
        done, result = self._near.recv()
        if not done:
            raise AssertionError(result)
        return result

    def split(self):
        """Have it fork a child, which is a puppet, too, with copies of its memory."""
        child = Puppet.__new__(Puppet)
        self.tell("split")
        child.pid = self.hear()
        handle = reduction.recv_handle(self._near)
        child._near = multiprocessing.connection.Connection(handle)
        child._pidfd = os.pidfd_open(child.pid)
        child._ends = child._code = None
        return child

    def send_signal(self, number):
        signal.pidfd_send_signal(self._pidfd, number)

    def wait(self, seconds=30):
        """Wait for its end, and give its exit code, as `subprocess` does."""
        assert select.select([self._pidfd], [], [], seconds)[0], "it does not end"
        if self._ends is not None:  # or its parent is another puppet
            with self._ends:
                self._code = os.waitstatus_to_exitcode(int(self._ends.recv(16)))
            self._ends = None
        return self._code

    def let_go(self):
        """Have it end of its own accord, and give its exit code."""
        self._near.close()
        return self._over()

    def end(self):
        """Kill it, and wait for its end."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                self.send_signal(signal.SIGKILL)
            self._near.close()
            self._over()

    def _over(self):
        code = self.wait()
        os.close(self._pidfd)
        self._pidfd = None
        return code


def obey(line):
    """Be a puppet of the kind that is told first, until the other side hangs up."""
    strings = multiprocessing.connection.Connection(line)
    try:
        kind, args, named = strings.recv()
        puppet = kind(*args, **named)
    except Exception:
        strings.send((False, traceback.format_exc()))
        return
    strings.send((True, None))
    serve(puppet, strings)


def serve(puppet, strings):
    """Do what is told, until the other side hangs up."""
    puppet.line = strings
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            deed, args, named = strings.recv()
            try:
                answer = True, getattr(puppet, deed)(*args, **named)
            except Exception:
                answer = False, traceback.format_exc()
            if deed != "split" or not answer[0]:  # which has answered already
                strings.send(answer)
