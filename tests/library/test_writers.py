"""Other threads write while memory is merged: no write is lost, nobody waits for ever.

Each writer fills pages of its own with values that occur elsewhere, too, so that
they merge again and again, and looks after each write whether it is still there.
"""

import ctypes
import errno
import os
import sys
import threading
import time

import numpy as np
import pytest

import sksm
from sksm import session
from sksm.linux import libc
from sksm.spans import PAGE_SIZE
from tests.memory import Area, KeptStore
from tests.rows import content

pytestmark = pytest.mark.usefixtures("here")

PAGES = 64
ROUNDS = 25
memset = ctypes.CDLL(None).memset  # releases the interpreter's lock for the call
memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t


@pytest.fixture(autouse=True)
def _short_turns():
    """Threads take the interpreter's lock from each other often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def fill_by_numpy(rows, value):
    rows[:] = value


def fill_by_memset(rows, value):
    memset(rows.ctypes.data, value, rows.nbytes)


def fill_bytes(rows, value):
    """Byte by byte through Python, holding the lock."""
    for row in rows:
        for at in (0, 1, PAGE_SIZE - 1):
            row[at] = value


def fill_by_the_kernel(rows, value):
    """A copy that the kernel makes: system calls write, too."""
    source = np.full(rows.nbytes, value, np.uint8)
    here = libc.iovec(rows.ctypes.data, rows.nbytes)
    there = libc.iovec(source.ctypes.data, source.nbytes)
    where = ctypes.byref(here), 1, ctypes.byref(there), 1, 0
    libc.process_vm_readv(threading.current_thread().pid, *where)


def holds(rows, value, fill):
    if fill is fill_bytes:
        return bool((rows[:, [0, 1, -1]] == value).all())
    return bool((rows == value).all())


class Writer(threading.Thread):
    """Writes to its rows until told to stop; `lost` says which write went missing."""

    def __init__(self, rows, fill, start):
        super().__init__()
        self.pid = os.getpid()
        self.rows, self.fill, self.first = rows, fill, start
        self.stop, self.lost, self.writes = threading.Event(), None, 0

    def run(self):
        value = self.first
        while not self.stop.is_set() and self.lost is None:
            value = value % 5 + 1
            self.fill(self.rows, value)
            if not holds(self.rows, value, self.fill):
                self.lost = value
            self.writes += 1
            if self.writes % 10 == 0:  # of three that want the lock, all get it
                time.sleep(1e-4)
        self.last = value


class writing:  # noqa: N801  used like a function
    """Writers at work on the rows of an area, as long as the block lasts."""

    def __init__(self, rows, fills):
        parts = np.array_split(np.arange(len(rows)), len(fills))
        self.writers = [
            Writer(rows[part[0] : part[-1] + 1], fill, at)
            for at, (part, fill) in enumerate(zip(parts, fills, strict=True))
        ]

    def __enter__(self):
        for writer in self.writers:
            writer.start()
        return self.writers

    def __exit__(self, *_):
        for writer in self.writers:
            writer.stop.set()
        for writer in self.writers:
            writer.join(60)
            assert not writer.is_alive(), "a writer waits for ever"


FILLS = {
    "numpy": [fill_by_numpy] * 2,
    "memset": [fill_by_memset] * 2,
    "bytes": [fill_bytes] * 2,
    "all": [fill_by_numpy, fill_by_memset, fill_bytes],
}


@pytest.mark.parametrize("fills", FILLS)
@pytest.mark.parametrize("way", ["object", "range"])
def test_no_write_is_lost_while_its_page_is_merged(memory, fills, way):
    """Whether the writer holds the interpreter's lock in the fault or not."""
    one, stable = memory(PAGES), memory(6)
    stable.rows[:] = np.arange(6)[:, None]
    sksm.merge(stable.rows)
    one.rows[:] = 1
    with writing(one.rows, FILLS[fills]) as writers:
        for _ in range(8 if fills == "bytes" else ROUNDS):  # Python is slow
            if way == "object":
                report = sksm.merge(one.rows)
            else:
                report = sksm.merge_range(one.span.start, one.span.size)
            assert report.scanned == PAGES
            assert sum(w.lost is not None for w in writers) == 0
    assert all(writer.writes for writer in writers)
    assert all(holds(w.rows, w.last, w.fill) for w in writers)
    assert (stable.rows == np.arange(6)[:, None]).all()


@pytest.mark.root
def test_no_write_of_the_kernel_is_lost_while_its_page_is_merged(memory):
    """As root: without privilege such a write fails with EFAULT for a moment."""
    one = memory(PAGES)
    one.rows[:] = 1
    with writing(one.rows, [fill_by_the_kernel] * 2) as writers:
        for _ in range(ROUNDS):
            sksm.merge(one.rows)
    assert [w.lost for w in writers] == [None, None]
    assert all(holds(w.rows, w.last, w.fill) for w in writers)


@pytest.mark.parametrize("fills", ["numpy", "memset"])
def test_no_write_is_lost_while_its_page_is_unmerged(memory, fills):
    """Back and forth: merged by one call, private again by the next."""
    one = memory(PAGES)
    one.rows[:] = 1
    with writing(one.rows, FILLS[fills]) as writers:
        for _ in range(ROUNDS):
            sksm.merge(one.rows)
            sksm.unmerge(one.rows)
    assert all(writer.lost is None for writer in writers)
    assert all(holds(w.rows, w.last, w.fill) for w in writers)


@pytest.mark.check
def test_threads_that_merge_at_once_take_turns(memory, different):
    """Each its own memory, all of them the same."""
    content = different(PAGES)
    mine = [memory(PAGES) for _ in range(4)]
    reports = []

    def work(one):
        for _ in range(5):
            one.rows[:] = content
            reports.append(sksm.merge(one.rows))

    threads = [threading.Thread(target=work, args=(one,)) for one in mine]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(reports) == 20
    assert sum(report.stored for report in reports) == PAGES
    assert all((one.rows == content).all() for one in mine)


def test_memory_unmapped_by_another_thread_is_no_crash(puppets):
    """At any moment of a merge; in a process of its own, which must live on."""
    assert puppets().do(merge_what_is_unmapped) == 80


def merge_what_is_unmapped():
    """Merge memory, again and again, that another thread unmaps; gives how often."""
    store = KeptStore()
    session.RemoteStore = lambda *_, **__: store
    rows = content(1, 600)
    gate = threading.Barrier(2)
    ends = 0

    def unmap(one, turn):
        gate.wait()
        for page in range(turn % 7, 600, 40):
            part = one.part(page, min(600, page + 1 + turn % 40))
            libc.munmap(part.start, part.size)

    for turn in range(80):
        one = Area(600)
        one.rows[:] = rows
        if turn % 2:
            one.rows[::3] = turn
        thread = threading.Thread(target=unmap, args=(one, turn))
        thread.start()
        gate.wait()
        try:
            sksm.merge_range(*one.where)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
        ends += 1
        thread.join()
        one.close()
    return ends
