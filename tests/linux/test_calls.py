"""Call lists: the machine code, its reference in Python, and what they promise."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksm.linux import calls, libc

pytestmark = pytest.mark.check

MACHINE = os.uname().machine
GETPID, SIGPROCMASK, SIGPENDING, TGKILL = {
    "x86_64": (39, 14, 127, 234),
    "aarch64": (172, 135, 136, 131),
}[MACHINE]
NOWHERE = 4095  # no system call has this number
ENOSYS = 38

needs_code = pytest.mark.skipif(
    not calls.uninterrupted(), reason=f"no machine code for {MACHINE}, or forbidden"
)


@pytest.mark.skipif(
    not (shutil.which("as") and shutil.which("objcopy")), reason="needs binutils"
)
@pytest.mark.skipif(MACHINE not in calls.SOURCE, reason=f"no source for {MACHINE}")
def test_machine_code_is_what_its_source_assembles_to(tmp_path):
    """The bytes that run are those that can be read."""
    compiled, flat = tmp_path / "code.o", tmp_path / "code.bin"
    subprocess.run(
        ["as", "-o", compiled, "-"], input=calls.SOURCE[MACHINE], text=True, check=True
    )
    subprocess.run(
        ["objcopy", "-O", "binary", "-j", ".text", compiled, flat], check=True
    )
    assert flat.read_bytes() == calls.CODE[MACHINE]


# Calls whose result is known beforehand, and arguments for them.
FUNCTIONS = [
    (libc.address_of("abs"), 2**64 - 5),  # an int, negative: 5
    (libc.address_of("abs"), 7),
    (libc.address_of("toupper"), ord("a")),
    (GETPID, 0),
    (NOWHERE, 0),
]
RESULTS = [5, 7, ord("A"), -ENOSYS]
ROWS = st.lists(
    st.tuples(st.sampled_from(FUNCTIONS), st.sampled_from(RESULTS), st.integers(1, 20)),
    max_size=12,
)


def table_of(rows):
    """Rows of (function, argument), the result wanted, how far to jump if not."""
    table = np.zeros(len(rows), calls.CALL)
    for at, ((function, arg), want, ahead) in enumerate(rows):
        target = min(at + ahead, len(rows)) * calls.CALL.itemsize
        row = function, (arg, *[0] * 5), want, table.ctypes.data + target, -77
        table[at] = row
    return table


@needs_code
@given(ROWS)
def test_machine_code_does_what_the_reference_does(rows):
    """Same rows run, same results, same jumps, for any table."""
    fast, slow = table_of(rows), table_of(rows)
    calls.execute(fast)
    calls.execute_slowly(slow)
    assert fast["result"].tolist() == slow["result"].tolist()


@pytest.fixture(params=[pytest.param("code", marks=needs_code), "reference"])
def executed(request, monkeypatch):
    """Run call lists by the machine code, and by its stand-in."""
    if request.param == "reference":
        monkeypatch.setattr(calls, "uninterrupted", lambda: False)


@pytest.mark.usefixtures("executed")
def test_a_failed_row_ends_its_block_and_no_other():
    """What stands behind a block runs whatever became of it."""
    pid, script = os.getpid(), calls.CallList(calls.Here())
    with script.block():
        script.call(GETPID, want=pid)
        script.call(NOWHERE)
        script.call(GETPID, want=pid)
    with script.block():
        script.call(GETPID, want=pid)
    script.call(NOWHERE)
    script.call(GETPID, want=pid)

    done = script.run()

    assert done.ran.tolist() == [True, True, False, True, True, True]
    assert done.met.tolist() == [True, False, False, True, False, True]
    assert done.results[[1, 4]].tolist() == [-ENOSYS, -ENOSYS]


@pytest.mark.usefixtures("executed")
def test_arguments_arrive_in_their_places():
    """All six of a system call, and four of a function."""
    source, target = np.arange(100, dtype=np.uint8), np.zeros(100, np.uint8)
    pieces = (libc.iovec * 2)(
        (target.ctypes.data, 100), (source.ctypes.data, source.nbytes)
    )
    into = ctypes.addressof(pieces)
    script = calls.CallList(calls.Here())
    where = (os.getpid(), into, 1, into + ctypes.sizeof(libc.iovec), 1, 0)
    script.syscall("process_vm_readv", *where, want=100)
    memcmp = libc.address_of("memcmp")
    script.call(memcmp, source.ctypes.data, target.ctypes.data, 100)

    assert script.run().met.all()
    assert (source == target).all()


@pytest.mark.usefixtures("executed")
def test_a_negative_int_of_a_function_is_negative():
    """memcmp's int is not taken for a large number."""
    script = calls.CallList(calls.Here())
    low, high = ctypes.c_char(b"a"), ctypes.c_char(b"b")
    where = (ctypes.addressof(low), ctypes.addressof(high), 1)
    script.call(libc.address_of("memcmp"), *where)
    assert script.run().results[0] < 0


def test_an_empty_list_runs():
    """Nothing to do is done at once."""
    assert len(calls.CallList(calls.Here()).run().results) == 0


@contextlib.contextmanager
def handled(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append(number))
    try:
        yield heard
    finally:
        signal.signal(number, before)


@pytest.mark.usefixtures("executed")
def test_signals_wait_until_the_list_is_done():
    """Inside, all are blocked but those that a bug of ours would raise."""
    mask, pending = ctypes.c_uint64(), ctypes.c_uint64()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with handled(signal.SIGUSR1) as heard:
        script = calls.CallList(calls.Here())
        script.call(TGKILL, os.getpid(), threading.get_native_id(), signal.SIGUSR1)
        script.call(SIGPENDING, ctypes.addressof(pending), 8)
        script.call(SIGPROCMASK, signal.SIG_BLOCK, 0, ctypes.addressof(mask), 8)
        assert script.run().met.all()
    blocked = {number for number in range(1, 65) if mask.value >> number - 1 & 1}
    faults = {"SIGILL", "SIGTRAP", "SIGBUS", "SIGFPE", "SIGSEGV", "SIGSYS"}
    free = {getattr(signal, name) for name in faults} | {signal.SIGKILL, signal.SIGSTOP}
    assert blocked == set(range(1, 65)) - free
    assert pending.value >> signal.SIGUSR1 - 1 & 1
    assert heard == [signal.SIGUSR1]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.usefixtures("executed")
def test_signals_that_were_blocked_before_stay_blocked():
    """The mask afterwards is the one from before, not an empty one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        script = calls.CallList(calls.Here())
        with script.block():
            script.call(NOWHERE)
            script.call(GETPID)
        script.run()
        now = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert now == before | {signal.SIGUSR2}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
