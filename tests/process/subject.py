"""Processes that do what they are told (`obey.py`), and how to look at them."""

import ast
import contextlib
import os
import re
from pathlib import Path

from sksm.linux import libc, maps
from sksm.process.reading import read_bytes
from sksm.spans import PAGE_SIZE, Span
from tests.conftest import frames, poll

RW = libc.PROT_READ | libc.PROT_WRITE
PRIVATE = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
_SCRIPT = Path(__file__).with_name("obey.py").read_text()


class Subject:
    """Such a process, as the tests see it; `worker` of the tests starts it."""

    def __init__(self, worker, **popen):
        self.process = worker(_SCRIPT, **popen)
        self.pid = self.process.pid
        self.do("0")

    def do(self, line):
        """Have it evaluate an expression, and give the value."""
        return ast.literal_eval(self.process.ask(line))

    def tell(self, line):
        """Have it begin something that does not come back at once."""
        self.process.process.stdin.write(line + "\n")
        self.process.process.stdin.flush()

    def rests(self):
        """Wait until it does nothing but wait for the next word."""
        poll(lambda: waits_in(self.pid, "read"))
        return self

    def become(self, uid):
        """Be another user's from now on."""
        self.do(f"become({uid})")
        return self


def waits_in(pid, call):
    """Say whether the main thread of a process waits in a system call, by its name."""
    numbers = {"read": (0,), "futex": (202,), "nanosleep": (35, 230)}[call]
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/syscall").read_text().split()[0]) in numbers
    return False


def vdso_of(pid):
    """Read the vdso, in whose unused end the stub lies while there is one."""
    (span,) = (m.span for m in maps.every_mapping(pid) if m.path == "[vdso]")
    return read_bytes(pid, span.start, span.size)


def descriptors_of(pid):
    """Give what each descriptor of a process is."""
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return found


def mappings_of(pid):
    """List the mappings of a process, as the kernel tells them."""
    return Path(f"/proc/{pid}/maps").read_text().splitlines()


def status_of(pid, field):
    text = Path(f"/proc/{pid}/status").read_text()
    return re.search(rf"^{field}:\s*(.*)$", text, re.M)[1]


def state_of(pid):
    """Give all of what a foothold could leave behind."""
    return {
        "descriptors": descriptors_of(pid),
        "mappings": mappings_of(pid),
        "vdso": vdso_of(pid),
        "signals": [status_of(pid, name) for name in ("SigBlk", "SigIgn", "SigCgt")],
        "tracer": status_of(pid, "TracerPid"),
    }


class Piece:
    """Pages of a subject between two that nobody may touch, and their bytes.

    Args:
        subject: whose; whatever has `do` and `pid`.
        pages: how many.
        how: the rest, as for `map`.
    """

    def __init__(self, subject, pages, **how):
        self.subject, self.pages, self.pid = subject, pages, subject.pid
        size = (pages + 2) * PAGE_SIZE
        guard = subject.do(f"call('mmap', 0, {size}, 0, {PRIVATE}, -1, 0)")
        self.start = guard + PAGE_SIZE
        self.map(**how)

    def map(self, part=(0, None), prot=RW, flags=PRIVATE, fd=-1):
        """Map a part of it anew, of a file from where the part begins."""
        where = self.part(*part)
        how = (prot, flags | libc.MAP_FIXED, fd, part[0] * PAGE_SIZE if fd >= 0 else 0)
        self._call("mmap", where, *how)

    def unmap(self, first=0, stop=None):
        self._call("munmap", self.part(first, stop))

    def protect(self, prot, first=0, stop=None):
        self._call("mprotect", self.part(first, stop), prot)

    def advise(self, advice, first=0, stop=None):
        self._call("madvise", self.part(first, stop), advice)

    def _call(self, name, span, *rest):
        self.subject.do(f"call({name!r}, {span.start}, {span.size}, *{rest})")

    def part(self, first=0, stop=None):
        start = self.start + first * PAGE_SIZE
        count = (self.pages if stop is None else stop) - first
        return Span(start, start + count * PAGE_SIZE)

    @property
    def span(self):
        return self.part()

    def write(self, data, page=0):
        """Have the process write there."""
        self.subject.do(f"write({self.part(page).start}, {bytes(data)!r})")

    def read(self, first=0, stop=None):
        """Have the process read."""
        part = self.part(first, stop)
        return self.subject.do(f"ctypes.string_at({part.start}, {part.size})")

    def mappings(self):
        """List its mappings, those of its neighbours left out."""
        span = self.span
        return [m for m in maps.every_mapping(self.pid) if (m.span & span) == m.span]

    def frames(self):
        """Physical frames, each page read first. As root only."""
        self.read()
        return frames(self.span, self.pid)
