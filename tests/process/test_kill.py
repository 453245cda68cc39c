"""SIGKILL of the process that merges another: that one goes on, whenever it was.

There is no last will: what is restored, the program's own thread restores by itself.
"""

import contextlib
import os
import random
import select
import signal

import pytest

from sksm.linux import ptrace
from sksm.linux.features import Feature
from sksm.store.local import LocalStore
from tests.conftest import poll
from tests.process import merging
from tests.support import start_child

pytestmark = pytest.mark.needs(
    Feature.PTRACE_SEIZE, Feature.USERFAULTFD_WP, Feature.PIDFD_GETFD
)

PROGRAMS = [
    ("threads", 5, 4),
    *(
        pytest.param((name, 0), marks=pytest.mark.slow)
        for name in ("calls", "registers", "signals")
    ),
]
A_MERGE_SECONDS = 0.3  # kills are spread over about as much
# What each killed merge may leave in a program: /dev/userfaultfd, a userfaultfd and a
# pool; and what it had mapped aside, to be put in a place that turned out different.
OURS = ("anon_inode:[userfaultfd]", "/dev/userfaultfd", "/memfd:sksm-pool")
MOST_LINKS, MOST_STRAYS = 3, 1


def ours(target):
    """List the descriptors in a program that a merge opened there."""
    return [link for link in target.links() if link.startswith(OURS)]


def strays(target):
    """List the mappings in a program that are a merge's, and no part of its data."""
    spans = target.spans()
    return [
        (span, name)
        for span, name in target.maps()
        if "sksm-pool" in name and not any((span & one).pages for one in spans)
    ]


class Merger:
    """A forked process that merges a program until it is killed."""

    def __init__(self, target):
        self._told, far = os.pipe()
        self.pid = start_child(
            lambda: merging.merge_for_ever(target, lambda: os.write(far, b"."))
        )
        os.close(far)
        assert os.read(self._told, 1), "the merger ended by itself"

    def freeze(self):
        os.kill(self.pid, signal.SIGSTOP)
        poll(lambda: os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG))

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        assert os.WIFSIGNALED(status), "the merger ended by itself"
        os.close(self._told)


def held(target, pid):
    """Say whether a process holds threads of the program just now."""
    return any(tracer == pid for _, tracer in target.states().values())


def unharmed(target, kills):
    """See that the program runs by itself, with little left behind in it."""
    poll(target.let_go)
    target.goes_on()
    assert len(ours(target)) <= MOST_LINKS * kills, ours(target)
    assert len(strays(target)) <= MOST_STRAYS * kills, strays(target)


def end(target, kills):
    """Merge once to the end, and tell the program to end; say what is left of it."""
    store = LocalStore()
    with contextlib.closing(store):
        poll(lambda: merging.merge(target, store).already)  # of the time before
    unharmed(target, kills)
    print(f"left: {sorted(ours(target))}, {strays(target)}")
    target.ends_well()


@pytest.mark.parametrize(
    "kills", [8, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.limit(900)])]
)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[0])
def test_a_merge_killed_at_any_time_leaves_a_program_that_goes_on(
    target, program, kills
):
    """Not stopped, not traced, with all its bytes, and with little left behind."""
    one = target(*program)
    chance = random.Random(kills)
    within = 0
    for number in range(kills):
        merger = Merger(one)
        select.select([], [], [], chance.uniform(0, A_MERGE_SECONDS))
        if frozen := chance.randrange(2):
            merger.freeze()
        within += frozen and held(one, merger.pid)
        merger.kill()
        unharmed(one, number + 1)
    print(f"{program[0]}: {kills} kills; threads were held at {within}, half not asked")
    end(one, kills)


class Steps:
    """A forked process that merges a program once, a system call at a time."""

    def __init__(self, target):
        go, self._gate = os.pipe()
        self.pid = start_child(lambda: self._merge(target, go))
        os.close(go)
        ptrace.seize(self.pid)
        ptrace.interrupt(self.pid)
        os.close(self._gate)

    def _merge(self, target, go):
        os.close(self._gate)
        os.read(go, 1)
        store = LocalStore()
        with contextlib.suppress(BlockingIOError):
            merging.merge(target, store)

    def run(self, stops):
        """Run to where a call begins or ends, so often; gives how often it did."""
        for number in range(stops + 1):
            while True:
                _, status = os.waitpid(self.pid, ptrace.WALL)
                if not os.WIFSTOPPED(status):
                    assert status == 0, "the merge failed"
                    self.pid = 0
                    return number
                call = os.WSTOPSIG(status) == ptrace.SYSCALL_STOP
                if call or ptrace.event(status):
                    break
                ptrace.resume_to_syscall(self.pid, os.WSTOPSIG(status))
            if number < stops:
                ptrace.resume_to_syscall(self.pid)
        return stops

    def kill(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, ptrace.WALL)


@pytest.mark.parametrize(
    "kills", [8, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.limit(900)])]
)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[0])
def test_a_merge_killed_at_any_system_call_leaves_a_program_that_goes_on(
    target, program, kills
):
    """Where a call begins, and where it has ended, from the first to the last."""
    one = target(*program)
    whole = Steps(one)
    calls = whole.run(1 << 30)
    assert calls > 100, "hardly a call was met"
    within = 0
    for number in range(kills):
        merger = Steps(one)
        merger.run(calls * number // kills)
        within += bool(merger.pid) and held(one, merger.pid)
        merger.kill()
        unharmed(one, number + 1)
    print(
        f"{program[0]}: {kills} kills at {calls} steps; threads were held at {within}"
    )
    end(one, kills)


@pytest.mark.parametrize(
    "kills", [3, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.limit(900)])]
)
def test_the_next_merge_waits_for_what_a_killed_one_left_to_itself(target, kills):
    """A signal that was pending comes before a thread's registers are restored.

    While its handler runs, the stub and the frame to restore from must stay.
    """
    one = target("handlers")
    whole = Steps(one)
    calls = whole.run(1 << 30)
    for number in range(kills):
        merger = Steps(one)
        merger.run(calls // 6 + calls // 2 * number // kills)
        if merger.pid and held(one, merger.pid):
            os.kill(one.pid, signal.SIGALRM)
        merger.kill()
        for _ in range(6):
            store = LocalStore()
            with contextlib.closing(store):
                merging.merge(one, store)
        assert one.process.poll() is None, one
    end(one, kills)
