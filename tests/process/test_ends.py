"""A program that is stopped, traced, or ends while somebody merges it."""

import contextlib
import os
import select
import signal
import subprocess

import pytest

from sksm.linux import ptrace
from sksm.linux.features import Feature
from sksm.process import guards
from sksm.process.procfiles import ProcFiles
from sksm.store.local import LocalStore
from tests.conftest import ended, poll
from tests.process import merging
from tests.support import start_child

pytestmark = pytest.mark.needs(
    Feature.PTRACE_SEIZE, Feature.USERFAULTFD_WP, Feature.PIDFD_GETFD
)

PROGRAMS = [
    ("threads", 4, 4),
    *(
        pytest.param(program, marks=pytest.mark.slow)
        for program in (("calls", 0), ("signals", 0), ("lives", 3))
    ),
]


def stop(target):
    os.kill(target.pid, signal.SIGSTOP)
    poll(lambda: set(target.states().values()) == {("T", 0)})


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[0])
def test_a_stopped_program_is_merged_and_stays_stopped(target, program):
    """It does nothing before its SIGCONT, and then everything as ever."""
    one = target(*program)
    stop(one)
    before = one.turns()
    store = LocalStore()
    with contextlib.closing(store):
        for _ in range(2):
            report = merging.merge(one, store)
            assert (one.turns() == before).all()
            poll(lambda: set(one.states().values()) == {("T", 0)})
    assert report.already > 0, report
    os.kill(one.pid, signal.SIGCONT)
    one.goes_on()
    one.ends_well()


@pytest.mark.slow  # a merge is interrupted again and again, and takes its time
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[0])
def test_a_program_stopped_and_continued_all_the_time_bears_a_merge(target, program):
    """Job control between our stops, and during them."""
    one = target(*program)

    def control():
        while True:
            for number in (signal.SIGSTOP, signal.SIGCONT):
                os.kill(one.pid, number)
                select.select([], [], [], 0.02)  # it must get on, too

    pid = start_child(control)
    try:
        for _ in range(2):
            store = LocalStore()
            with contextlib.closing(store):
                merging.merge(one, store)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.kill(one.pid, signal.SIGCONT)
    poll(one.let_go)
    one.goes_on()
    one.ends_well()


def test_a_program_under_a_debugger_is_refused(target):
    """The reason names who traces it; nothing of it is touched."""
    one = target("threads", 2, 2)
    told, tell = os.pipe()

    def debug():
        ptrace.seize(one.pid)
        os.write(tell, b".")
        signal.pause()

    pid = start_child(debug)
    os.read(told, 1)
    store = LocalStore()
    with contextlib.closing(store):
        assert guards.objection_to(one.pid)
        with contextlib.suppress(PermissionError):
            report = merging.merge(one, store)
            assert report.refused == report.scanned
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(told)
    os.close(tell)
    one.goes_on()
    one.ends_well()


@pytest.mark.parametrize("how", ["told", "killed"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[0])
def test_a_program_that_ends_meanwhile_is_no_error(target, program, how):
    """Whoever merges it is told that it has ended; whoever started it, how."""
    for _ in range(3):
        one = target(*program)
        told, tell = os.pipe()

        def merge_until_it_ends(one=one, tell=tell):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                merging.merge_for_ever(one, lambda: os.write(tell, b"."))

        pid = start_child(merge_until_it_ends)
        os.read(told, 1)
        if how == "told":
            one.ends_well()
        else:
            one.process.kill()
            assert one.process.wait(30) == -signal.SIGKILL
        poll(lambda pid=pid: ended(pid))
        assert os.waitpid(pid, 0)[1] == 0, "see the traceback"
        os.close(told)
        os.close(tell)


@pytest.mark.parametrize("name", ["pagemap", "mem"])
def test_the_files_of_a_program_that_ended_say_so(name):
    """To an ordinary user, too, whom the kernel then denies its own program's."""
    child = subprocess.Popen(["true"])
    poll(lambda: ended(child.pid))
    with pytest.raises(ProcessLookupError):
        _ = ProcFiles(child.pid)[name]
    child.wait()
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        _ = ProcFiles(child.pid)[name]
