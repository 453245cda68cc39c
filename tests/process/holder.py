"""Processes that hold pages of known contents, alone in a mapping.

`python -m tests.process.holder` obeys lines on stdin, each with one line on stdout.
"""

import ctypes
import json
import mmap
import os
import sys

import numpy as np
import xxhash

from sksm.linux import libc
from sksm.process.other import OtherProcess
from sksm.spans import PAGE_SIZE, Span


def content(kind):
    """Give a page by its number: 0 is all zeros, others are all different."""
    if kind == 0:
        return np.zeros(PAGE_SIZE, np.uint8)
    return np.random.default_rng(kind).integers(1, 256, PAGE_SIZE, np.uint8)


class Held:
    """Pages between two that nobody may read, so that no mapping joins theirs.

    The last one is never touched: of a mapping it is not merged.
    """

    def __init__(self, kinds):
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

    def collapse(self):
        """Have the kernel make huge pages of it at once; gives 0, or the errno."""
        try:
            libc.madvise(self.span.start, self.span.size, 25)  # MADV_COLLAPSE
        except OSError as error:
            return error.errno
        return 0

    def checksum(self):
        return xxhash.xxh3_64_hexdigest(self.mmap[PAGE_SIZE : -2 * PAGE_SIZE])

    def put(self, index, kind):
        at = (index + 1) * PAGE_SIZE
        self.mmap[at : at + PAGE_SIZE] = content(kind).tobytes()


class Window(OtherProcess):
    """Another process, of which only one span is seen."""

    def __init__(self, pid, span):
        super().__init__(pid)
        self.span = span

    def mappings(self, span):
        return super().mappings(span & self.span)


class Holder:
    """A process that holds pages; `worker` of the tests starts it."""

    def __init__(self, worker, kinds):
        self.process = worker("from tests.process.holder import main; main()")
        self.pid = self.process.pid
        self.span = Span(*map(int, self.ask("hold", kinds)))

    def ask(self, *words):
        return json.loads(self.process.ask(json.dumps(words)))

    def page(self, index):
        """Say where a page is."""
        return self.span.start + index * PAGE_SIZE

    def window(self, pid=None):
        return Window(pid or self.pid, self.span)


def main():
    """Obey until stdin ends."""
    held = None
    for line in sys.stdin:
        word, *args = json.loads(line)
        answer = 0
        if word == "hold":
            held = Held(args[0])
            answer = held.span.start, held.span.stop
        elif word == "put":
            held.put(*args)
        elif word == "drop":
            held.mmap.madvise(mmap.MADV_DONTNEED)
        elif word == "fork":
            answer = fork()
        elif word == "exec":
            print(json.dumps(0), flush=True)
            script = "from tests.process.holder import main; main()"
            os.execv(sys.executable, [sys.executable, "-c", script])
        elif word == "sum":
            answer = held.checksum()
        elif word == "huge":
            answer = held.collapse()
        print(json.dumps(answer), flush=True)


def fork():
    """Leave a child behind that holds the same until this process is gone."""
    near, far = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(far)
        os.close(1)
        os.read(near, 1)
        os._exit(0)
    os.close(near)
    return pid
