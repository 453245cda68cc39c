"""A foothold: call lists run in another process, and nothing is left of it."""

import contextlib
import errno
import os
import signal
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sksm.errors import SksmError
from sksm.linux import calls, ptrace
from sksm.linux.features import Feature
from sksm.process import stub
from sksm.process.foothold import Foothold
from sksm.process.other import OtherProcess
from sksm.process.stopping import Threads
from sksm.process.there import There
from sksm.spans import PAGE_SIZE
from sksm.store.local import LocalStore
from tests.conftest import Worker, poll
from tests.process.subject import (
    Subject,
    descriptors_of,
    state_of,
    status_of,
    waits_in,
)
from tests.puppets import Obedient
from tests.support import count_fds

pytestmark = [
    pytest.mark.needs(Feature.PTRACE_SEIZE, Feature.PIDFD_GETFD),
    pytest.mark.usefixtures("patient"),
]

GETPID, GETTID, NOWHERE = 39, 186, 4095


@pytest.fixture
def subject(worker):
    """A process that does what it is told."""
    return Subject(worker).rests()


@contextlib.contextmanager
def foothold_in(pid):
    """Have a foothold in a process until the block ends."""
    with contextlib.closing(Threads(pid)) as threads:
        foothold = Foothold(threads)
        foothold.establish()
        try:
            yield foothold
        finally:
            foothold.leave()


def pid_when_held(foothold, check=lambda: None):
    """Hold all threads, make a check, and have one of them ask for the number."""

    def work(held):
        check()
        rows = calls.CallList(There(foothold, held))
        rows.call(GETPID, want=foothold.pid)
        rows.call(GETTID)
        return rows.run()

    return foothold.threads.hold_all(work)


def pid_by_call(foothold):
    """Have the process ask the kernel for its number."""
    rows = calls.CallList(There(foothold))
    rows.call(GETPID, want=foothold.pid)
    rows.call(GETTID)
    return rows.run()


def assert_works(foothold):
    done = pid_by_call(foothold)
    assert done.met[0], done
    assert done.results[0] == foothold.pid


# -- coming, working, going


@pytest.mark.check
def test_nothing_is_left_behind(subject):
    """No descriptor, mapping, stub, tracer or blocked signal; nor with ourselves."""
    before, ours = state_of(subject.pid), count_fds()
    with foothold_in(subject.pid) as foothold:
        assert stub.find(state_of(subject.pid)["vdso"])[1].pid == os.getpid()
        foothold.lend(0)
        assert_works(foothold)
        during = state_of(subject.pid)
        assert len(during["descriptors"]) == len(before["descriptors"]) + 2
        assert during["mappings"] != before["mappings"]
        assert during["signals"] == before["signals"]
        assert during["tracer"] == "0"
    assert state_of(subject.pid) == before
    assert count_fds() == ours
    assert subject.do("6 * 7") == 42


def test_a_process_can_be_held_by_one_foothold_after_the_other(subject):
    """The second finds what the first found."""
    before = state_of(subject.pid)
    for _ in range(3):
        with foothold_in(subject.pid) as foothold:
            assert_works(foothold)
    assert state_of(subject.pid) == before


def test_leaving_without_having_come_does_nothing(subject):
    """As happens when somebody else was there first."""
    before = state_of(subject.pid)
    Foothold(Threads(subject.pid)).leave()
    assert state_of(subject.pid) == before


def test_a_descriptor_is_lent_and_taken_back(subject):
    """The same open file, closed on exec; and what it opened can be fetched."""
    file = os.memfd_create("lent")
    with foothold_in(subject.pid) as foothold:
        there = foothold.lend(file)
        assert descriptors_of(subject.pid)[there].startswith("/memfd:lent")
        assert ptrace.same_file(subject.pid, there, file)
        assert not subject.do(f"os.get_inheritable({there})")

        def open_one(thread):
            opened = thread.call("userfaultfd", os.O_CLOEXEC | 1)
            return opened, foothold.take(thread, opened)

        opened, ours = foothold.have(open_one)
        assert opened not in descriptors_of(subject.pid)
        assert os.readlink(f"/proc/self/fd/{ours}") == "anon_inode:[userfaultfd]"
        os.close(ours)
    os.close(file)
    assert there not in descriptors_of(subject.pid)


HARMLESS = st.sampled_from([(NOWHERE, 0), (3, 2**31), (102, 0)])  # close, getuid
RESULTS = st.sampled_from([-errno.ENOSYS, -errno.EBADF, os.getuid(), 5])
BLOCKS = st.lists(st.lists(st.tuples(HARMLESS, RESULTS), max_size=5), max_size=5)


@pytest.fixture(scope="module")
def lasting():
    """A foothold for many examples."""
    one = Subject(Worker)
    Threads.await_stop.__defaults__, before = (60.0,), Threads.await_stop.__defaults__
    try:
        with foothold_in(one.pid) as foothold:
            yield foothold
    finally:
        Threads.await_stop.__defaults__ = before
        one.process.end()


quick = settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@quick
@given(BLOCKS)
def test_a_list_does_there_what_it_does_here(lasting, blocks):
    """Same rows run, same results, same blocks skipped."""
    done = []
    for home in (There(lasting), calls.Here()):
        rows = calls.CallList(home)
        for block in blocks:
            with rows.block():
                for (function, arg), want in block:
                    rows.call(function, arg, want=want)
        done.append(rows.run())
    there, here = done
    assert there.results.tolist() == here.results.tolist()
    assert there.ran.tolist() == here.ran.tolist()
    assert there.met.tolist() == here.met.tolist()


def test_a_list_of_nothing_runs(subject):
    """Only what is put around it."""
    with foothold_in(subject.pid) as foothold:
        assert len(calls.CallList(There(foothold)).run().results) == 0


def test_a_list_that_is_too_long_is_refused_before_anything_is_done(subject):
    """The workspace has its size."""
    with foothold_in(subject.pid) as foothold:
        home = There(foothold)
        rows = calls.CallList(home)
        home.place(np.zeros(1 << 18, np.uint8))
        rows.call(GETPID)
        with pytest.raises(OSError, match="call list") as caught:
            rows.run()
        assert caught.value.errno == errno.E2BIG
        assert_works(foothold)


# -- processes in all states


@pytest.mark.parametrize("how", ["nanosleep", "read", "futex", "busy"])
def test_a_thread_is_borrowed_from_what_it_does(subject, tmp_path, how):
    """And goes on with it: a wait is begun again, and ends as it would have."""
    flag = tmp_path / "flag"
    flag.write_bytes(b"\0")
    subject.tell(f"wait_for({how!r}, {os.fspath(flag)!r})")
    if how == "busy":
        poll(lambda: status_of(subject.pid, "State").startswith("R"))
    else:
        poll(lambda: waits_in(subject.pid, how))
    with foothold_in(subject.pid) as foothold:
        for _ in range(10):
            assert_works(foothold)
    with open(flag, "r+b") as file:
        file.write(b"\1")
    assert subject.process.answer() == repr(how)
    assert subject.do("6 * 7") == 42


@pytest.mark.parametrize("everyone", [False, True])
def test_a_process_of_many_threads_is_one_process(subject, everyone):
    """One of them does the work; none is lost, and none stays stopped."""
    tids = subject.do("threads(6)")
    subject.rests()
    before = state_of(subject.pid)
    with foothold_in(subject.pid) as foothold:
        for _ in range(5):
            done = pid_when_held(foothold) if everyone else pid_by_call(foothold)
            assert done.met[0]
            assert done.results[1] in (subject.pid, *tids)
    assert state_of(subject.pid) == before
    for tid in tids:
        assert status_of(f"{subject.pid}/task/{tid}", "State")[0] in "SR"
        assert status_of(f"{subject.pid}/task/{tid}", "TracerPid") == "0"


def test_all_threads_are_held_while_a_check_is_made(subject):
    """Each is stopped by us, and none afterwards."""
    tids = subject.do("threads(3)")
    seen = {}

    def look():
        for tid in (subject.pid, *tids):
            seen[tid] = status_of(f"{subject.pid}/task/{tid}", "State")[0]

    with foothold_in(subject.pid) as foothold:
        assert pid_when_held(foothold, look).met[0]
    assert seen == dict.fromkeys((subject.pid, *tids), "t")


class Spoilt(Exception):
    pass


@pytest.mark.check
def test_a_check_that_fails_leaves_everything_undone(subject):
    """What it raises comes out, and the process goes on."""

    def fail():
        raise Spoilt

    with foothold_in(subject.pid) as foothold:
        with pytest.raises(Spoilt):
            pid_when_held(foothold, fail)
        assert_works(foothold)
        assert status_of(subject.pid, "TracerPid") == "0"
    assert subject.do("6 * 7") == 42


ALL = "signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}"


@pytest.mark.parametrize("deed", ["block", "ignore"])
def test_a_process_that_wants_no_signals_is_no_different(subject, deed):
    """It keeps its mask and its handlers."""
    if deed == "block":
        subject.do(f"bool(signal.pthread_sigmask(signal.SIG_SETMASK, {ALL}))")
    else:
        subject.do(f"[signal.signal(n, signal.SIG_IGN) for n in {ALL}] and 0")
    before = state_of(subject.rests().pid)
    with foothold_in(subject.pid) as foothold:
        assert_works(foothold)
    assert state_of(subject.pid) == before


def test_a_stopped_process_stays_stopped(subject):
    """Job control is its user's: the work is done, and it is continued later."""
    before = state_of(subject.pid)
    os.kill(subject.pid, signal.SIGSTOP)
    poll(lambda: status_of(subject.pid, "State").startswith("T"))
    with foothold_in(subject.pid) as foothold:
        assert_works(foothold)
        poll(lambda: status_of(subject.pid, "State").startswith("T"))
    assert state_of(subject.pid) == before
    poll(lambda: status_of(subject.pid, "State").startswith("T"))
    os.kill(subject.pid, signal.SIGCONT)
    assert subject.do("6 * 7") == 42


def test_a_process_whose_main_thread_ended_is_left_alone(subject):
    """Its memory cannot be told by its number any more; its threads go on."""
    tids = subject.do("threads(1)")
    subject.tell("end_main_thread()")
    poll(lambda: status_of(subject.pid, "State").startswith("Z"))
    refused = pytest.raises(OSError, match=r"vdso|another program")
    with refused, foothold_in(subject.pid):
        pass
    assert status_of(f"{subject.pid}/task/{tids[0]}", "TracerPid") == "0"


def test_a_process_that_has_ended_is_gone(subject):
    """Before, and between two lists."""
    with foothold_in(subject.pid) as foothold:
        subject.process.kill()
        with pytest.raises(ProcessLookupError):
            pid_by_call(foothold)
        with pytest.raises(ProcessLookupError):
            foothold.leave()
    with pytest.raises(OSError, match=r"."), foothold_in(subject.pid):
        pass


# -- signals at a bad moment


def sends_first(monkeypatch, name, pid, number):
    """Have a signal come just when the thread is set going for the first time."""
    resume, sent = getattr(ptrace, name), []

    def send_and_resume(tid, *args):
        if not sent:
            sent.append(number)
            os.kill(pid, number)
        resume(tid, *args)

    monkeypatch.setattr(ptrace, name, send_and_resume)
    return sent


@pytest.mark.check
@pytest.mark.parametrize(
    "moment", ["resume_to_syscall", "resume"], ids=["coming", "working"]
)
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGSTOP"])
def test_a_signal_that_comes_first_is_delivered_first(
    subject, monkeypatch, moment, name
):
    """Once, and then the work is done; the process may be stopped by it."""
    subject.do("hear(signal.SIGUSR1)")
    before = state_of(subject.rests().pid)
    number = signal.Signals[name]
    if moment == "resume_to_syscall":
        sent = sends_first(monkeypatch, moment, subject.pid, number)
    with foothold_in(subject.pid) as foothold:
        if moment == "resume":
            sent = sends_first(monkeypatch, moment, subject.pid, number)
        assert_works(foothold)
    assert sent
    if name == "SIGSTOP":
        poll(lambda: status_of(subject.pid, "State").startswith("T"))
        os.kill(subject.pid, signal.SIGCONT)
    assert state_of(subject.rests().pid) == before
    assert subject.do("heard") == ([10] if name == "SIGUSR1" else [])


class Once:
    """Does something the first time it is called."""

    def __init__(self, deed):
        self.deeds = [deed]

    def __call__(self):
        while self.deeds:
            self.deeds.pop()()


def test_signals_while_it_works_come_afterwards(subject):
    """As many as were sent, of those that queue; and the work is begun again."""
    number = signal.SIGRTMIN + 3
    subject.do(f"hear({int(number)})")

    def work(check):
        try:
            return pid_when_held(foothold, check).met[0]
        except BlockingIOError:  # the signal came first
            return False

    with foothold_in(subject.pid) as foothold:
        for _ in range(5):
            check = Once(lambda: os.kill(subject.pid, number))
            poll(lambda check=check: work(check))
    subject.do("0")
    assert subject.do("len(heard)") == 5


def test_ctrl_c_comes_when_the_threads_were_let_go(subject):
    """What is done while they are held is done; and the foothold is good for more."""
    before, done = state_of(subject.pid), []

    def work(_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # longer than the handler takes
        done.append(status_of(subject.pid, "TracerPid"))

    with foothold_in(subject.pid) as foothold:
        with pytest.raises(KeyboardInterrupt):
            foothold.threads.hold_all(work)
        assert done != ["0"]
        assert status_of(subject.pid, "TracerPid") == "0"
        assert_works(foothold)
    assert state_of(subject.pid) == before


# -- two of us


class Merger(Obedient):
    """Has a foothold in another process, from one deed to the next."""

    def enter(self, pid):
        self.store = LocalStore()
        with contextlib.ExitStack() as stack:
            space = stack.enter_context(OtherProcess(pid))
            space._established()
            space._pool_there(self.store.pool)
            space._barrier()
            self.undo = stack.pop_all()

    def leave(self):
        self.undo.close()


@pytest.fixture
def merger(puppets):
    """Give `merger(pid)`: a process with a foothold in that one, until told."""

    def start(pid):
        one = puppets(Merger)
        one.enter(pid)
        return one

    return start


def test_the_second_of_two_is_told_who_the_first_is(subject, merger):
    """And changes nothing; when the first is done, it is let in."""
    before = state_of(subject.pid)
    first = merger(subject.pid)
    during = state_of(subject.pid)
    expected = pytest.raises(SksmError, match=f"process {first.pid} is merging it")
    with expected, foothold_in(subject.pid):
        pass
    assert state_of(subject.pid) == during
    first.leave()
    with foothold_in(subject.pid) as foothold:
        assert_works(foothold)
    assert state_of(subject.pid) == before


@pytest.mark.needs(Feature.USERFAULTFD_WP)
def test_what_a_killed_one_left_is_taken_out_by_the_next(subject, merger):
    """Its descriptors, its mapping and its stub."""
    before = state_of(subject.pid)
    merger(subject.pid).end()
    left = state_of(subject.pid)
    assert left["mappings"] != before["mappings"]
    assert left["tracer"] == "0"
    assert subject.do("6 * 7") == 42
    with foothold_in(subject.rests().pid) as foothold:
        assert_works(foothold)
    assert state_of(subject.pid) == before


@pytest.mark.needs(Feature.USERFAULTFD_WP)
def test_what_a_killed_one_left_is_taken_out_while_its_numbers_are_in_use(
    subject, merger
):
    """The program closed our descriptors meanwhile, and opened files of its own."""
    merger(subject.pid).end()
    highest = max(descriptors_of(subject.pid))
    subject.do("os.closerange(3, 256)")
    subject.do(f"[os.open('/dev/null', os.O_RDONLY) for _ in range({highest})] and 0")
    own = descriptors_of(subject.rests().pid)
    with foothold_in(subject.pid) as foothold:
        assert_works(foothold)
    assert descriptors_of(subject.pid) == own


# -- programs that do what nobody expects


NEXT = "print('ready', flush=True); import sys; sys.stdin.read()"


@pytest.mark.check
def test_a_program_that_is_executed_meanwhile_is_not_touched(subject):
    """It has nothing of ours: not the stub, nor the workspace."""
    with foothold_in(subject.pid) as foothold:
        foothold.lend(0)
        word = subject.process.ask(
            f"os.execv(sys.executable, [sys.executable, '-c', {NEXT!r}])"
        )
        assert word == "ready"
        subject.rests()
        before = state_of(subject.pid)
        with pytest.raises(ProcessLookupError, match="another program"):
            pid_by_call(foothold)
        with pytest.raises(ProcessLookupError, match="another program"):
            foothold.leave()
        assert state_of(subject.pid) == before
    assert subject.process.end() == 0


def test_descriptors_that_the_program_closed_are_not_closed_again(subject):
    """Their numbers are its own now. It is told as an error, and work ends."""
    with foothold_in(subject.pid) as foothold:
        foothold.lend(0)
        subject.do("os.closerange(3, 256)")
        with pytest.raises(OSError, match="closed descriptors") as caught:
            pid_by_call(foothold)
        assert caught.value.errno == errno.EBADF
        subject.do("[os.open('/dev/null', os.O_RDONLY) for _ in range(9)] and 0")
        own = descriptors_of(subject.rests().pid)
        with pytest.raises(OSError, match="closed descriptors"):
            foothold.leave()
        assert descriptors_of(subject.pid) == own
    assert subject.do("6 * 7") == 42
    with foothold_in(subject.rests().pid) as foothold:  # clears what was left
        assert_works(foothold)
    assert descriptors_of(subject.pid) == own


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_table_of_open_files_is_an_error(subject, room):
    """A foothold takes two for a moment: EMFILE, and nothing is left."""
    subject.do(f"leave_no_descriptor({room})")
    before, ours = state_of(subject.rests().pid), count_fds()
    expected = pytest.raises(OSError, match="socketpair")
    with expected as caught, foothold_in(subject.pid):
        pass
    assert caught.value.errno == errno.EMFILE
    assert state_of(subject.pid) == before
    assert count_fds() == ours


def test_a_table_of_open_files_that_fills_up_is_an_error(subject):
    """The foothold itself has room, what is to be lent has not."""
    subject.do("leave_no_descriptor(2)")
    before = state_of(subject.rests().pid)
    with foothold_in(subject.pid) as foothold:
        foothold.lend(0)
        with pytest.raises(OSError, match="open files") as caught:
            foothold.lend(0)
        assert caught.value.errno == errno.EMFILE
        assert_works(foothold)
    assert state_of(subject.pid) == before


def test_addresses_for_what_is_under_way_are_free_and_aligned(subject):
    """As far into a page table as what they are for, so that whole ones can move."""
    with foothold_in(subject.pid) as foothold:
        taken = [
            range(*(int(word, 16) for word in line.split()[0].split("-")))
            for line in state_of(subject.pid)["mappings"]
        ]
        last = 0
        for turn in range(500):
            like = (turn * 37) * PAGE_SIZE
            at = foothold.spare(2 << 20, like)
            assert (at - like) % (2 << 20) == 0
            assert at >= last or at < foothold.workspace.start + (1 << 40)
            assert not any(at in one or one.start in range(at, at + 1) for one in taken)
            last = at + (2 << 20)


def test_a_thread_in_32_bit_code_is_refused(subject, monkeypatch):
    """The same process may have others."""
    monkeypatch.setattr(ptrace, "CODE_64_BIT", 0x23)
    before = state_of(subject.pid)
    expected = pytest.raises(OSError, match="32-bit")
    with expected as caught, foothold_in(subject.pid):
        pass
    assert caught.value.errno == errno.ENOTSUP
    assert state_of(subject.pid) == before
