"""Filters as we run them, against the kernel."""

import contextlib
import ctypes
import errno
import os
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sksm.linux import libc, ptrace, seccomp
from sksm.linux.seccomp import Action, Class
from tests.conftest import poll

pytestmark = pytest.mark.check

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
GETPPID = {"x86_64": 110, "aarch64": 173}[os.uname().machine]
NR, ARGS = 0, 16  # offsets in struct seccomp_data
K, X = 0, seccomp.BPF_X
LOAD = Class.LD | seccomp.BPF_ABS
EQUAL = Class.JMP | seccomp.BPF_JEQ


class sock_fprog(ctypes.Structure):  # noqa: N801
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def program(*instructions):
    """Give a filter of (code, jt, jf, k)."""
    return np.array(list(instructions), seccomp.INSTRUCTION)


def answering(action, data=0):
    """Give a filter that answers `getppid`, and lets everything else pass."""
    return program(
        (LOAD, 0, 0, NR),
        (EQUAL, 1, 0, GETPPID),
        (Class.RET, 0, 0, Action.ALLOW),
        (Class.RET, 0, 0, action | data),
    )


def install(filters):
    """Put this process under filters, in that order."""
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for one in filters:
        fprog = sock_fprog(len(one), one.ctypes.data)
        libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(fprog), 0, 0)


def under(filters, calls):
    """Tell the results of `calls` in a child under `filters`; -SIGSYS where it died.

    A call is of `getppid`, which ignores its arguments.
    """
    near, far = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            install(filters)
            for args in calls:
                result = libc.raw_syscall(GETPPID, *map(ctypes.c_ulong, args))
                result = ctypes.get_errno() + 1000 if result < 0 else 0
                os.write(far, result.to_bytes(8, "little", signed=True))
            os._exit(0)
        os._exit(1)
    os.close(far)
    with open(near, "rb") as results:
        told = np.frombuffer(results.read(), "<i8").tolist()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return [*told, -os.WTERMSIG(status)]
    assert status == 0
    return told


# What a process sees that has neither a tracer nor a listener: `errno` + 1000.
EFFECTS = {
    Action.KILL_PROCESS: -signal.SIGSYS,
    Action.KILL_THREAD: -signal.SIGSYS,
    Action.TRAP: -signal.SIGSYS,
    Action.ERRNO: errno.EXDEV + 1000,
    Action.USER_NOTIF: errno.ENOSYS + 1000,
    Action.TRACE: errno.ENOSYS + 1000,
    Action.LOG: 0,
    Action.ALLOW: 0,
}


@pytest.mark.parametrize("second", Action)
@pytest.mark.parametrize("first", Action)
def test_the_most_restrictive_of_two_filters_wins(first, second):
    """In the kernel's order, whichever came first."""
    filters = [answering(first, errno.EXDEV), answering(second, errno.EXDEV)]
    said = seccomp.verdict(filters, GETPPID)
    assert said in (first, second)
    assert under(filters, [()]) == [EFFECTS[said]]


def test_an_action_that_nobody_knows_kills():
    """What the kernel does with filters that are newer than itself."""
    filters = [answering(0x00010000)]
    assert seccomp.verdict(filters, GETPPID) is Action.KILL_PROCESS
    assert under(filters, [()]) == [-signal.SIGSYS]


def test_other_calls_and_no_filters_are_allowed():
    """The other end of a filter, and of the list."""
    assert seccomp.verdict([answering(Action.TRAP)], GETPPID + 1) is Action.ALLOW
    assert seccomp.verdict([], GETPPID) is Action.ALLOW


def test_a_filter_can_look_at_where_a_call_comes_from():
    """Processor, and the address of the instruction."""
    filters = [
        program(
            (LOAD, 0, 0, offset),
            (EQUAL, 1, 0, value),
            (Class.RET, 0, 0, Action.TRAP),
            (Class.RET, 0, 0, Action.ALLOW),
        )
        for offset, value in ((4, seccomp.AUDIT_ARCH), (8, 0x2000), (12, 0x1))
    ]
    said = [seccomp.verdict(filters, 1, at=at) for at in (0x100002000, 0x2000)]
    assert said == [Action.ALLOW, Action.TRAP]
    elsewhere = seccomp.verdict(filters, 1, arch=1, at=0x100002000)
    assert elsewhere is Action.TRAP


words = st.integers(0, 2**32 - 1) | st.integers(0, 40)
slots = st.integers(0, 3)  # of scratch memory, which the prologue fills
choosy = {seccomp.BPF_DIV, seccomp.BPF_LSH, seccomp.BPF_RSH}
arithmetic = st.sampled_from(sorted(seccomp._ALU.keys() - choosy))
by_x = st.sampled_from(sorted(seccomp._ALU.keys() - {seccomp.BPF_NEG}))
instructions = st.one_of(
    # The child's instruction pointer is its own.
    st.tuples(st.just(LOAD), st.sampled_from([0, 4, *range(ARGS, 64, 4)])),
    st.tuples(st.sampled_from([Class.LD, Class.LDX]), words),
    st.tuples(st.sampled_from([Class.LD | 0x80, Class.LDX | 0x80]), st.just(0)),
    st.tuples(st.sampled_from([Class.LD | 0x60, Class.LDX | 0x60]), slots),
    st.tuples(st.sampled_from([Class.ST, Class.STX]), slots),
    st.tuples(st.sampled_from([Class.MISC, Class.MISC | 0x80]), st.just(0)),
    st.tuples(by_x.map(lambda o: Class.ALU | X | o), words),
    st.tuples(arithmetic.map(lambda o: Class.ALU | o), words),
    # A constant that is no sensible divisor or distance is refused.
    st.tuples(st.just(Class.ALU | seccomp.BPF_DIV), st.integers(1, 2**32 - 1)),
    st.tuples(
        st.sampled_from([0x60, 0x70]).map(lambda o: Class.ALU | o), st.integers(0, 31)
    ),
    st.tuples(
        st.sampled_from(sorted(seccomp._JUMPS)).map(lambda o: Class.JMP | o), words
    ),
    st.tuples(
        st.sampled_from(sorted(seccomp._JUMPS)).map(lambda o: Class.JMP | X | o), words
    ),
    st.tuples(st.just(Class.JMP), st.integers(0, 30)),  # always: BPF_JA
)


@st.composite
def filters_of_one(draw):
    """A filter that computes something of its input and answers with 12 bits of it.

    Which of them, the last argument says: by how much to shift it right.
    """
    body = draw(st.lists(instructions, max_size=30))
    made = [
        (LOAD, 0, 0, NR),
        (EQUAL, 1, 0, GETPPID),
        (Class.RET, 0, 0, Action.ALLOW),
        *((Class.ST, 0, 0, slot) for slot in range(4)),
    ]
    for place, (code, k) in enumerate(body):
        left = len(body) - place - 1
        jumps = code & 7 == Class.JMP
        ways = [draw(st.integers(0, left)) if jumps else 0 for _ in range(2)]
        always = code == Class.JMP
        made.append(
            (code, *([0, 0] if always else ways), min(k, left) if always else k)
        )
    memory = Class.LD | seccomp.BPF_MEM
    made += [
        (Class.ST, 0, 0, 15),
        (LOAD, 0, 0, ARGS + 5 * 8),
        (Class.MISC, 0, 0, 0),  # to X
        (memory, 0, 0, 15),
        (Class.ALU | seccomp.BPF_RSH | X, 0, 0, 0),
        (Class.ALU | seccomp.BPF_AND, 0, 0, 0xFFF),
        (Class.ALU | seccomp.BPF_OR, 0, 0, Action.ERRNO),
        (Class.RET | seccomp.BPF_A, 0, 0, 0),
    ]
    return program(*made)


arguments = st.lists(st.integers(0, 2**64 - 1), min_size=5, max_size=5)


@settings(max_examples=100, deadline=None)
@given(filters_of_one(), st.lists(arguments, min_size=1, max_size=3))
def test_a_filter_computes_what_it_computes_in_the_kernel(made, inputs):
    """Every instruction that the kernel lets in, all 32 bits of the result."""
    calls = [(*args, shift) for args in inputs for shift in (0, 12, 24)]
    expected = []
    for args in calls:
        data = seccomp.seccomp_data(
            GETPPID, seccomp.AUDIT_ARCH, 0, (ctypes.c_uint64 * 6)(*args)
        )
        answer = seccomp._run(made, np.frombuffer(bytes(data), "<u4").tolist())
        expected.append(outcome(answer))
    told = under([made], calls)
    dies = -signal.SIGSYS
    if dies in expected:
        expected = expected[: expected.index(dies) + 1]
    assert told == expected


def outcome(answer):
    """Say what the answer of such a filter does to `getppid`."""
    if answer == Action.KILL_THREAD:  # divided by 0
        return -signal.SIGSYS
    number = min(answer & 0xFFFF, 4095)  # MAX_ERRNO
    return number + 1000 if number else 0


@contextlib.contextmanager
def stopped_under(filters):
    """Give a child under `filters` that stands still for us."""
    near, far = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            install(filters)
            os.write(far, b"x")
            signal.pause()
        os._exit(1)
    assert os.read(near, 1) == b"x"
    ptrace.seize(child)
    ptrace.interrupt(child)
    poll(lambda: ptrace.wait(child))
    try:
        yield child
    finally:
        os.close(near), os.close(far)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.root
def test_filters_are_read_as_they_were_installed():
    """The oldest first."""
    filters = [answering(Action.ERRNO, 5), answering(Action.LOG)[[0, 1, 2, 2]]]
    with stopped_under(filters) as child:
        found = seccomp.read_filters(child)
    assert [one.tolist() for one in found] == [one.tolist() for one in filters]


@pytest.mark.root
def test_a_thread_without_filters_has_none_to_read():
    """Its status in /proc says so beforehand."""
    nothing = pytest.raises(OSError, match=os.strerror(errno.EINVAL))
    with stopped_under([]) as child, nothing:
        seccomp.read_filters(child)


@pytest.mark.skipif(os.getuid() == 0, reason="root has leave")
def test_reading_filters_takes_a_capability():
    """CAP_SYS_ADMIN, which containers seldom have."""
    filters = [answering(Action.LOG)]
    with stopped_under(filters) as child, pytest.raises(PermissionError):
        seccomp.read_filters(child)
