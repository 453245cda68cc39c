"""Processes that have nothing to do with each other share, with no set-up at all."""

import os
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

import sksm
from sksm.spans import PAGE_SIZE, Span
from tests.conftest import daemon_pid, frames, poll
from tests.puppets import Obedient
from tests.rows import content

pytestmark = pytest.mark.usefixtures("runtime")


class Program(Obedient):
    """Makes the same pages as every other, merges them, and does what it is told."""

    def __init__(self, pages):
        self.rows = sksm.empty((pages, PAGE_SIZE), np.uint8)
        self.rows[:] = content(7, pages)

    def merge(self):
        report = sksm.merge(self.rows)
        return report.stored, report.merged, report.already

    def where(self):
        return self.rows.ctypes.data, self.rows.ctypes.data + self.rows.nbytes

    def write(self, page):
        self.rows[page, 0] ^= 255

    def sum(self):
        return int(self.rows.sum(dtype=np.uint64))

    def unmerge(self):
        return sksm.unmerge(self.rows)


@pytest.fixture
def program(puppets):
    return lambda pages=16: puppets(Program, pages)


def frames_of(process):
    """Its pages' physical frames; it reads them first. As root only."""
    process.sum()
    return frames(Span(*process.where()), process.pid)


def test_separate_processes_share_what_they_merge(program):
    """The first stores, the others merge; nobody prepared anything."""
    answers = [program().merge() for _ in range(3)]
    assert answers == [(16, 0, 0), (0, 16, 0), (0, 16, 0)]


@pytest.mark.root
def test_their_frames_are_the_same(program):
    """All of them, for all of the processes; and of this one."""
    mine = sksm.empty((16, PAGE_SIZE), np.uint8)
    mine[:] = content(7, 16)
    sksm.merge(mine)
    others = [program() for _ in range(3)]
    assert [other.merge() for other in others] == [(0, 16, 0)] * 3
    int(mine[:, 0].sum())
    expected = frames(Span(mine.ctypes.data, mine.ctypes.data + mine.nbytes))
    assert len(set(expected.tolist()) - {0}) == 16
    assert all((frames_of(other) == expected).all() for other in others)


@pytest.mark.root
def test_a_write_in_one_process_is_seen_in_no_other(program):
    """Copy-on-write un-merges one page of one process."""
    one, two, three = processes = [program() for _ in range(3)]
    for process in processes:
        process.merge()
    before = one.sum()
    two.write(5)
    assert two.sum() != before
    assert [p.sum() for p in (one, three)] == [before, before]
    assert (frames_of(one) == frames_of(three)).all()
    shared = frames_of(one) == frames_of(two)
    assert np.flatnonzero(~shared).tolist() == [5]


@pytest.mark.root
def test_unmerging_in_one_process_leaves_the_others_shared(program):
    """It gets copies; they keep the pool's pages."""
    one, two, three = processes = [program() for _ in range(3)]
    for process in processes:
        process.merge()
    before = one.sum()
    assert two.unmerge() == 16 * PAGE_SIZE
    assert [p.sum() for p in processes] == [before] * 3
    assert not (frames_of(one) == frames_of(two)).any()
    assert (frames_of(one) == frames_of(three)).all()


def test_the_end_of_who_stored_the_pages_harms_nobody(program):
    """Killed; the others read on, and newcomers still merge with them."""
    one, two = program(), program()
    one.merge()
    two.merge()
    before = two.sum()
    one.end()
    assert two.sum() == before
    assert program().merge() == (0, 16, 0)


def test_the_end_of_the_daemon_harms_nobody(program, runtime):
    """What is merged is read and written as before; the next merge starts another."""
    one, two = program(), program()
    for process in (one, two):
        process.merge()
    before = one.sum()
    old = psutil.Process(daemon_pid(runtime))
    old.kill()
    poll(lambda: not old.is_running() or old.status() == psutil.STATUS_ZOMBIE)
    assert [p.sum() for p in (one, two)] == [before, before]
    two.write(3)
    assert one.sum() == before
    assert program().merge() == (16, 0, 0)  # a new daemon, an empty pool
    assert one.merge()[1] == 16  # moved over from the pool left behind
    assert daemon_pid(runtime) != old.pid
    assert one.sum() == before


def memory_kib(pid, field):
    """One figure of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def pool_kib(pid):
    """What the pool of a daemon occupies, by its file."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if "sksm-pool" in os.readlink(fd):
            return os.stat(fd).st_blocks // 2
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["stored", "merged"])
def test_memory_rises_by_less_than_100_mib_while_a_gib_is_merged(
    program, runtime, first
):
    """Anonymous memory of client and daemon, and the pool, looked at all the time."""
    pages = (1 << 30) // PAGE_SIZE
    if not first:
        program(pages).merge()
    sksm.merge(sksm.empty(PAGE_SIZE * 2, np.uint8))  # there is a daemon
    daemon, process = daemon_pid(runtime), program(pages)
    process.sum()

    def occupied():
        own = sum(memory_kib(pid, "RssAnon") for pid in (process.pid, daemon))
        return own + pool_kib(daemon)

    before, peak, done = occupied(), 0, threading.Event()
    teller = threading.Thread(target=lambda: (process.merge(), done.set()))
    teller.start()
    while not done.is_set():
        peak = max(peak, occupied())
    teller.join()
    assert peak - before < 100 << 10, f"{(peak - before) >> 10} MiB"


def test_a_process_without_threads_and_one_with_share(program, different):
    """The way a page is protected makes no difference to who shares it."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        program().merge()
        mine = sksm.empty((16, PAGE_SIZE), np.uint8)
        mine[:] = content(7, 16)
        assert sksm.merge(mine).merged == 16
    finally:
        end.set()
        thread.join()


def test_an_undumpable_process_is_told_why_it_cannot_merge(puppets):
    """As an ordinary user it may not look at its own pages; as root it may."""
    process = puppets()
    process.hide()
    assert process.do(outcome_of_a_merge) in ("merged 4", "told why")


def outcome_of_a_merge():
    rows = sksm.empty((4, PAGE_SIZE), np.uint8)
    rows[:] = 3
    try:
        said = f"merged {sksm.merge(rows).scanned}"
    except sksm.NotPermitted as error:
        said = "told why" if "PR_SET_DUMPABLE" in str(error) else str(error)
    return said if (rows == 3).all() else "changed"
