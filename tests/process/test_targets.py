"""The programs of targets/: they notice what is wrong, and nothing else.

Without this, that they go on under a merge would prove nothing.
"""

import contextlib
import os
import signal
import time

import pytest

from sksm.linux.features import Feature
from sksm.spans import PAGE_SIZE
from tests.conftest import poll
from tests.process import disturb

pytestmark = pytest.mark.needs(Feature.PTRACE_SEIZE)

# Program, arguments. The last number of most chooses what the main thread does.
PROGRAMS = [
    ("threads", 6, 16),
    ("registers", 0),
    ("calls", 0),
    ("signals", 0),
    ("lives", 0),
    ("execs", 3),
    ("rseq", 4),
]


def disturbed(target, how, seconds):
    """Disturb a program for a while; it goes on, and may say EINTR where any would."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        how(target)
        assert target.process.poll() is None, target
    target.goes_on()
    counts = target.named("interrupted").items()
    assert {name for name, count in counts if count} <= disturb.EINTR_BY_ANY_STOP


@pytest.mark.parametrize("how", [disturb.stop_threads, disturb.stop_process])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[0])
def test_a_program_bears_what_every_tracer_does(target, program, how):
    """To be stopped for a moment is nothing that its checks mind."""
    one = target(*program)
    disturbed(one, how, 0.5)
    one.ends_well()


@pytest.mark.check
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[0])
def test_a_program_notices_one_wrong_byte(target, program):
    """Of all it offers; it says where, and exits with status 1."""
    one = target(*program)

    def spoilt():  # again if it executed itself meanwhile
        start = one.spans()[0].start if one.spans() else 0
        path = f"/proc/{one.pid}/mem"
        with contextlib.suppress(OSError), open(path, "r+b", 0) as memory:
            memory.seek(start + 5 * PAGE_SIZE + 77)  # of a page never written
            memory.write(b"\0")
        return one.process.poll() is not None

    poll(spoilt, 60)
    assert one.process.returncode == 1
    assert "page 5 " in one.said()


def test_a_program_notices_a_write_that_was_lost(target):
    """Also if the page holds what it held a moment ago."""
    one = target("threads", 2, 2)
    start = one.spans()[0].start + 64 * PAGE_SIZE  # pages that change
    with open(f"/proc/{one.pid}/mem", "r+b", 0) as memory:
        memory.seek(start)
        before = memory.read(64 * PAGE_SIZE)
        one.goes_on()
        memory.seek(start)
        memory.write(before)
    assert one.process.wait(60) == 1
    assert "writes" in one.said()


def test_two_programs_hold_equal_pages(target):
    """The same arguments make the same bytes, but for pages that are its own."""
    one, other = target("threads", 4, 4), target("threads", 4, 4)
    contents = []
    for program in (one, other):
        with open(f"/proc/{program.pid}/mem", "rb", 0) as memory:
            memory.seek(program.spans()[0].start)
            data = memory.read(program.spans()[0].size)
        contents.append(
            {data[at : at + PAGE_SIZE] for at in range(0, len(data), PAGE_SIZE)}
        )
    assert len(contents[0] & contents[1]) > 400
    assert len(contents[0] - contents[1]) > 60


def test_a_program_ends_with_whoever_started_it(target):
    """The end of its input is the end of it: nothing is left running."""
    one = target("execs", 2)
    os.kill(one.pid, signal.SIGCONT)
    one.ends_well()
