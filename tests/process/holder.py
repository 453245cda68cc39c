"""Processes that hold pages of known contents, alone in a mapping."""

import ctypes
import mmap
import os
import sys
from multiprocessing.connection import Connection

import numpy as np
import xxhash

from sksm.linux import libc
from sksm.process.other import OtherProcess
from sksm.spans import PAGE_SIZE, Span
from tests.puppets import Obedient, serve


def content(kind):
    """Give a page by its number: 0 is all zeros, others are all different."""
    if kind == 0:
        return np.zeros(PAGE_SIZE, np.uint8)
    return np.random.default_rng(kind).integers(1, 256, PAGE_SIZE, np.uint8)


class Held(Obedient):
    """Pages between two that nobody may read, so that no mapping joins theirs.

    The last one is never touched: of a mapping it is not merged.
    """

    def hold(self, kinds):
        """Hold a page of each kind, None: untouched; gives their bounds."""
        self.show()
        size = (len(kinds) + 3) * PAGE_SIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.mmap = mmap.mmap(-1, size, flags=flags)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.mmap))
        for guard in (start, start + size - PAGE_SIZE):
            libc.mprotect(guard, PAGE_SIZE, libc.PROT_NONE)
        self.span = Span(start + PAGE_SIZE, start + size - PAGE_SIZE)
        for index, kind in enumerate(kinds):
            if kind is not None:
                self.put(index, kind)
        return self.span.start, self.span.stop

    def huge(self):
        """Have the kernel make huge pages of it at once; gives 0, or the errno."""
        try:
            libc.madvise(self.span.start, self.span.size, 25)  # MADV_COLLAPSE
        except OSError as error:
            return error.errno
        return 0

    def sum(self):
        return xxhash.xxh3_64_hexdigest(self.mmap[PAGE_SIZE : -2 * PAGE_SIZE])

    def put(self, index, kind):
        at = (index + 1) * PAGE_SIZE
        self.mmap[at : at + PAGE_SIZE] = content(kind).tobytes()

    def drop(self):
        self.mmap.madvise(mmap.MADV_DONTNEED)

    def exec(self):
        """Become another program, which obeys in the same way."""
        line = self.line.fileno()
        os.set_inheritable(line, True)
        self.line.send((True, None))
        script = f"from tests.process import holder; holder.go_on({line})"
        os.execv(sys.executable, [sys.executable, "-c", script])


def go_on(line):
    """Obey as the program did in whose place this one is."""
    serve(Held(), Connection(line))


class Window(OtherProcess):
    """Another process, of which only one span is seen."""

    def __init__(self, pid, span):
        super().__init__(pid)
        self.span = span

    def mappings(self, span):
        return super().mappings(span & self.span)


class Holder:
    """Such a process as a test sees it; `puppets` of the tests starts it."""

    def __init__(self, puppets, kinds, uid=None):
        self.process = puppets(Held)
        self.pid = self.process.pid
        if uid is not None:
            self.process.become(uid)
        self.hold(kinds)

    def hold(self, kinds):
        self.span = Span(*self.ask("hold", kinds))

    def ask(self, deed, *args):
        return getattr(self.process, deed)(*args)

    def page(self, index):
        """Say where a page is."""
        return self.span.start + index * PAGE_SIZE

    def window(self, pid=None):
        return Window(pid or self.pid, self.span)
