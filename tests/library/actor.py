"""A puppet of the state machine: what programs do to memory, and merging it."""

import ctypes
import mmap

import numpy as np

import sksm
from sksm.linux import libc
from sksm.spans import PAGE_SIZE
from tests.puppets import Obedient


class Actor(Obedient):
    """Memory by name, and what can be done to it. Pages are counted from 0."""

    def __init__(self):
        self.memory = {}
        self.raw = set()  # names of which a raw range was merged

    def _bytes(self, name):
        return np.frombuffer(self.memory[name], np.uint8)

    def _part(self, name, first, stop):
        """Address and length of pages; no view is left that would forbid a resize."""
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory[name]))
        return start + first * PAGE_SIZE, (stop - first) * PAGE_SIZE

    def map(self, name, pages):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.memory[name] = mmap.mmap(-1, pages * PAGE_SIZE, flags=flags)

    def allocate(self, name, pages):
        self.memory[name] = np.zeros(pages * PAGE_SIZE, np.uint8)

    def write(self, name, first, stop, value):
        self._bytes(name)[first:stop] = value

    def merge(self, name):
        return sksm.merge(self.memory[name]).as_dict()

    def merge_range(self, name, first, stop):
        self.raw.add(name)
        return sksm.merge_range(*self._part(name, first, stop)).as_dict()

    def unmerge(self, name):
        return sksm.unmerge(self.memory[name])

    def unmerge_range(self, name, first, stop):
        return sksm.unmerge_range(*self._part(name, first, stop))

    def protect(self, name, first, stop, prot):
        libc.mprotect(*self._part(name, first, stop), prot)

    def drop(self, name, first, stop):
        """Drop pages; merged ones first become private, or the pool's would come."""
        sksm.unmerge_range(*self._part(name, first, stop))
        libc.madvise(*self._part(name, first, stop), libc.MADV_DONTNEED)

    def resize(self, name, pages):
        """Grow or shrink with mremap. False if the kernel refuses.

        What was merged as a raw range becomes private first, as `merge_range` asks
        for: it may be one mapping, which would grow into the pool.
        """
        if name in self.raw:
            sksm.unmerge_range(
                *self._part(name, 0, len(self.memory[name]) // PAGE_SIZE)
            )
            self.raw.discard(name)
        try:
            self.memory[name].resize(pages * PAGE_SIZE)
        except OSError:
            return False
        return True

    def free(self, name):
        memory = self.memory.pop(name)
        self.raw.discard(name)
        if isinstance(memory, mmap.mmap):
            memory.close()

    def content(self):
        return {name: bytes(self._bytes(name)) for name in self.memory}

    def daemon(self):
        return sksm.stats().daemon_pid
