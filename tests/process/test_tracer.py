"""Attaching to a thread ends, whatever the other process does at that moment."""

import contextlib
import gc
import os
import signal
import time

import pytest

from sksm.linux import ptrace
from sksm.linux.features import Feature
from sksm.process import tracer
from sksm.process.stopping import Threads
from sksm.process.tracer import Tracer
from tests.conftest import poll
from tests.process.freezer import Freezer
from tests.process.programs import threads_of
from tests.process.subject import Subject, status_of

pytestmark = pytest.mark.needs(Feature.PTRACE_SEIZE)


@pytest.fixture
def subject(worker):
    """A process that does what it is told."""
    return Subject(worker).rests()


@pytest.fixture
def freezer():
    """A control group to be frozen; thawed and removed at the end."""
    with contextlib.closing(Freezer()) as group:
        yield group


@pytest.fixture
def quick(monkeypatch):
    """Give up attaching soon."""
    monkeypatch.setattr(tracer, "ATTACH_SECONDS", 0.2)


def tracers(pid):
    return {status_of(f"{pid}/task/{tid}", "TracerPid") for tid in threads_of(pid)}


EXECUTE = "os.execv(sys.executable, [sys.executable, '-c', 'input(); print(6 * 7)'])"


def test_attaching_does_not_wait_for_an_execve_that_waits_for_us(subject):
    """The thread in execve holds a mutex until we reap a thread that we trace.

    Attaching to another one waits for that mutex (fs/exec.c, kernel/ptrace.c).
    """
    tids = subject.do("threads(3)")

    def meet(one=tids[0]):
        it.attach(one)
        subject.tell(EXECUTE)
        # The thread that we trace has been killed, and waits for us to know of it.
        poll(lambda: status_of(f"{subject.pid}/task/{one}", "State").startswith("Z"))
        with contextlib.suppress(ProcessLookupError, PermissionError):  # killed, too
            it.attach(tids[1])
        it.attach(subject.pid)

    it = Tracer(subject.pid)
    it.run(meet)
    it.release()
    assert subject.process.ask() == "42"


@pytest.mark.root
@pytest.mark.parametrize("stopped", [False, True], ids=["frozen", "stopped-and-frozen"])
def test_a_frozen_process_is_given_up_and_let_go(subject, freezer, quick, stopped):
    """In finite time; nothing of ours is left with it when it is thawed."""
    subject.do("threads(3)")
    freezer.add(subject.pid)
    if stopped:
        os.kill(subject.pid, signal.SIGSTOP)
        poll(lambda: status_of(subject.pid, "State").startswith("T"))
    freezer.freeze()
    with contextlib.closing(Threads(subject.pid)) as threads:
        for _ in range(3):
            with pytest.raises(BlockingIOError):
                threads.hold_all(list)
    freezer.thaw()
    if stopped:
        os.kill(subject.pid, signal.SIGCONT)
    poll(lambda: tracers(subject.pid) == {"0"})
    assert subject.do("6 * 7") == 42
    with contextlib.closing(Threads(subject.pid)) as threads:
        assert len(threads.hold_all(list)) == 4


@pytest.mark.root
def test_no_second_thread_waits_where_one_is_stuck_already(subject, freezer, quick):
    """However often it is tried: a scanner meets a frozen process in each epoch."""
    freezer.add(subject.pid)
    os.kill(subject.pid, signal.SIGSTOP)
    poll(lambda: status_of(subject.pid, "State").startswith("T"))
    freezer.freeze()
    before = len(threads_of(os.getpid()))
    for _ in range(5):
        with contextlib.closing(Threads(subject.pid)) as threads:
            with pytest.raises(BlockingIOError, match="frozen"):
                threads.hold_all(list)
            with pytest.raises(BlockingIOError, match="frozen"):
                threads.hold_one(lambda tid: tid)
    assert len(threads_of(os.getpid())) == before + 1
    freezer.thaw()
    poll(lambda: len(threads_of(os.getpid())) == before)


def test_who_does_not_stop_in_time_is_let_go_at_once(subject, monkeypatch):
    """It is not traced any more when the call returns, whenever it would stop."""
    monkeypatch.setattr(Threads.await_stop, "__defaults__", (-1.0,))
    with contextlib.closing(Threads(subject.pid)) as threads:
        for _ in range(20):
            with contextlib.suppress(BlockingIOError):  # one that stops at once is held
                threads.hold_all(list)
            assert tracers(subject.pid) == {"0"}
    assert subject.do("6 * 7") == 42


def test_what_a_signal_handler_raises_waits_for_the_end_of_the_hold(subject):
    """Once, whenever it comes; no result gets lost on the way, and none hangs."""

    class Tick(Exception):
        pass

    def raise_it(*_):
        raise Tick

    gc.disable()  # what a handler raises in a callback of that is not raised
    before = signal.signal(signal.SIGALRM, raise_it)
    ticks = 0
    try:
        with contextlib.closing(Threads(subject.pid)) as threads:
            for step in range(200):
                with contextlib.suppress(BlockingIOError):
                    try:
                        signal.setitimer(signal.ITIMER_REAL, 1e-6 * (step + 1))
                        threads.hold_all(lambda held: time.sleep(1e-4))
                        signal.setitimer(signal.ITIMER_REAL, 0)
                    except Tick:
                        ticks += 1
                assert tracers(subject.pid) == {"0"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    assert ticks > 20
    assert subject.do("6 * 7") == 42


def test_a_thread_that_changed_its_number_by_execve_is_let_go(subject):
    """It has the main thread's number afterwards, under which we trace it."""
    tids = subject.do("threads(2)")

    def meet():
        it.attach(subject.pid)
        for tid in tids:
            it.attach(tid)
        subject.tell(EXECUTE)
        poll(lambda: threads_of(subject.pid) == [subject.pid] or _reap(tids))
        ptrace.interrupt(subject.pid)

    it = Tracer(subject.pid)
    it.run(meet)
    it.release()
    assert tracers(subject.pid) == {"0"}
    assert subject.process.ask() == "42"


def _reap(tids):
    for tid in tids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(tid, os.WNOHANG | ptrace.WALL)
