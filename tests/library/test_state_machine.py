"""Several processes do what programs do to memory, and merge it in between.

Whatever the order: what a process reads is what it wrote, by a shadow copy.
"""

import contextlib

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sksm.report import OUTCOMES
from sksm.spans import PAGE_SIZE
from tests.conftest import poll
from tests.library.actor import Actor
from tests.library.stage import Process

MOST = 4  # processes, and pieces of memory in each
ANY = st.integers(0, 1 << 20)  # picks one of however many there are
PAGES = st.integers(1, 12)
BOUNDS = st.tuples(st.integers(0, 11), st.integers(1, 12))
VALUES = st.integers(0, 3)  # few, so that pages are equal; of zeros, too
RUNS = st.sampled_from([10, 15])  # where a run of different pages begins


class Programs(RuleBasedStateMachine):
    """Rules pick a process and a piece of its memory by number."""

    first: Process  # from which all are forked; it holds nothing

    def __init__(self):
        super().__init__()
        self.processes = []
        self.names = 0

    @initialize(sizes=st.lists(st.tuples(PAGES, PAGES), min_size=1, max_size=3))
    def start(self, sizes):
        for each in sizes:
            process = self.first.forked()
            self.processes.append(process)
            for pages in each:
                self.add(process, pages, True, 10)

    def pick(self, which, *, mapped=False):
        """Choose a process and a name it has memory under; None if it has none."""
        process = self.processes[which % len(self.processes)]
        names = sorted(process.mapped if mapped else process.shadow)
        return process, names[which // 7 % len(names)] if names else None

    @staticmethod
    def pages(process, name, bounds):
        """Fit bounds to memory: at least one page of it."""
        count = len(process.shadow[name]) // PAGE_SIZE
        first = bounds[0] % count
        return first, min(count, first + bounds[1])

    @rule(
        which=ANY,
        pages=PAGES,
        mapped=st.sampled_from([True, True, False]),
        run=st.sampled_from([None, 10, 10, 15]),
    )
    def make(self, which, pages, mapped, run):
        process = self.processes[which % len(self.processes)]
        if len(process.shadow) < MOST:
            self.add(process, pages, mapped, run)

    def add(self, process, pages, mapped, run):
        self.names += 1
        name = f"m{self.names}"
        process.do("map" if mapped else "allocate", name, pages)
        process.shadow[name] = np.zeros(pages * PAGE_SIZE, np.uint8)
        process.fixed[name] = [False] * pages
        if mapped:
            process.mapped.add(name)
        if run is not None:
            self.write_pages_of_run(process, name, run, range(pages))

    def write_pages_of_run(self, process, name, run, pages):
        """Write pages that differ, in an order that occurs elsewhere, too."""
        for page in pages:
            at = page * PAGE_SIZE
            self.write(process, name, at, at + PAGE_SIZE, run + page)

    @rule(which=ANY, bounds=BOUNDS, value=VALUES)
    def write_pages(self, which, bounds, value):
        process, name = self.pick(which)
        if name:
            first, stop = self.pages(process, name, bounds)
            self.write(process, name, first * PAGE_SIZE, stop * PAGE_SIZE, value)

    @rule(which=ANY, run=RUNS, bounds=BOUNDS)
    def write_run(self, which, run, bounds):
        process, name = self.pick(which)
        if name:
            pages = range(*self.pages(process, name, bounds))
            self.write_pages_of_run(process, name, run, pages)

    @rule(which=ANY, bounds=BOUNDS, value=VALUES, at=st.sampled_from([0, 9, 4095]))
    def write_byte(self, which, bounds, value, at):
        process, name = self.pick(which)
        if name:
            first, _ = self.pages(process, name, bounds)
            start = first * PAGE_SIZE + at
            self.write(process, name, start, start + 1, value)

    @staticmethod
    def write(process, name, start, stop, value):
        touched = range(start // PAGE_SIZE, (stop - 1) // PAGE_SIZE + 1)
        if not any(process.fixed[name][page] for page in touched):
            process.do("write", name, start, stop, value)
            process.shadow[name][start:stop] = value

    @rule(which=ANY)
    def merge(self, which):
        process, name = self.pick(which)
        if name:
            self.add_up(process.do("merge", name))

    @rule()
    def merge_everything(self):
        for process in self.processes:
            for name in process.shadow:
                self.add_up(process.do("merge", name))

    @rule(which=ANY, bounds=BOUNDS)
    def merge_range(self, which, bounds):
        process, name = self.pick(which, mapped=True)
        if name:
            first, stop = self.pages(process, name, bounds)
            report = process.do("merge_range", name, first, stop)
            self.add_up(report)
            assert report["scanned"] == stop - first

    @staticmethod
    def add_up(report):
        assert report["scanned"] == sum(report[name] for name in OUTCOMES)
        assert report["refused"] == sum(report["reasons"].values())

    @rule(which=ANY)
    def unmerge(self, which):
        process, name = self.pick(which)
        if name:
            process.do("unmerge", name)

    @rule(which=ANY, bounds=BOUNDS)
    def unmerge_range(self, which, bounds):
        process, name = self.pick(which, mapped=True)
        if name:
            process.do("unmerge_range", name, *self.pages(process, name, bounds))

    @rule(which=ANY, bounds=BOUNDS, fixed=st.booleans())
    def protect(self, which, bounds, fixed):
        process, name = self.pick(which, mapped=True)
        if name:
            first, stop = self.pages(process, name, bounds)
            process.do("protect", name, first, stop, 1 if fixed else 3)
            process.fixed[name][first:stop] = [fixed] * (stop - first)

    @rule(which=ANY, bounds=BOUNDS)
    def drop(self, which, bounds):
        process, name = self.pick(which, mapped=True)
        if name:
            first, stop = self.pages(process, name, bounds)
            process.do("drop", name, first, stop)
            process.shadow[name][first * PAGE_SIZE : stop * PAGE_SIZE] = 0

    @rule(which=ANY, pages=PAGES)
    def resize(self, which, pages):
        process, name = self.pick(which, mapped=True)
        if name and process.do("resize", name, pages):
            before = process.shadow[name]
            process.shadow[name] = after = np.zeros(pages * PAGE_SIZE, np.uint8)
            after[: len(before)] = before[: len(after)]
            fixed = process.fixed[name]
            process.fixed[name] = (fixed + [fixed[-1]] * pages)[:pages]

    @rule(which=ANY)
    def free(self, which):
        process, name = self.pick(which)
        if name:
            process.do("free", name)
            del process.shadow[name], process.fixed[name]
            process.mapped.discard(name)

    @precondition(lambda self: len(self.processes) < MOST)
    @rule(which=ANY)
    def fork(self, which):
        process = self.processes[which % len(self.processes)]
        self.processes.append(process.forked())

    @precondition(lambda self: len(self.processes) > 1)
    @rule(which=ANY, killed=st.booleans())
    def end(self, which, killed):
        process = self.processes.pop(which % len(self.processes))
        process.puppet.end() if killed else process.puppet.let_go()

    @rule(which=ANY, really=st.integers(0, 4).map(lambda number: number == 3))
    def kill_daemon(self, which, really):
        process = self.processes[which % len(self.processes)]
        if really and (pid := process.do("daemon")):
            with contextlib.suppress(psutil.NoSuchProcess):
                daemon = psutil.Process(pid)
                daemon.kill()
                poll(lambda: daemon.status() == psutil.STATUS_ZOMBIE)

    @rule(which=ANY)
    def look(self, which):
        self.processes[which % len(self.processes)].look()

    def teardown(self):
        try:
            for process in self.processes:
                process.look()
        finally:
            for process in self.processes:
                process.puppet.let_go()


@pytest.fixture
def programs(runtime, puppets):
    """The machine, with a daemon of its own."""
    return type("Machine", (Programs,), {"first": Process(puppets(Actor))})


def run(machine, **limits):
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        machine,
        settings=settings(deadline=None, suppress_health_check=checks, **limits),
    )


@pytest.mark.limit(600)  # a failure takes long to make small
def test_every_process_reads_what_it_wrote(programs):
    """Through merges, forks, resizes, protections, frees and ends, in any order."""
    run(programs, max_examples=45, stateful_step_count=50)


@pytest.mark.slow
@pytest.mark.limit(1800)
def test_every_process_reads_what_it_wrote_for_long(programs):
    """The same, with more and longer lives."""
    run(programs, max_examples=600, stateful_step_count=80)
