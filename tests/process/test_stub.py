"""The stub: what it is made of, and that nobody notices having run it."""

import contextlib
import errno
import os
import re
import shutil
import signal
import struct
import subprocess

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sksm.linux import calls, libc, ptrace
from sksm.linux.features import Feature
from sksm.linux.ptrace import Registers
from sksm.process import stub
from sksm.process.stopping import Threads
from tests.conftest import poll
from tests.support import start_child

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(
        os.uname().machine != "x86_64", reason="the stub is written for x86-64"
    ),
]

WORD = st.integers(0, 2**64 - 1)
NAMES = [name for name, _ in Registers._fields_]
NO_CALL = 2**64 - 1  # in orig_rax
# What a result means to the kernel when no signal came: arch/x86/kernel/signal.c.
AGAIN = (512, 513, 514)  # ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND
RESTART_BLOCK = 516


@pytest.mark.skipif(
    not (shutil.which("as") and shutil.which("objcopy")), reason="needs binutils"
)
def test_machine_code_is_what_its_source_assembles_to(tmp_path):
    """The bytes that other processes run are those that can be read."""
    compiled, flat = tmp_path / "code.o", tmp_path / "code.bin"
    subprocess.run(
        ["as", "-o", compiled, "-"], input=stub.SOURCE, text=True, check=True
    )
    subprocess.run(
        ["objcopy", "-O", "binary", "-j", ".text", compiled, flat], check=True
    )
    assert flat.read_bytes() == stub.CODE


@pytest.mark.skipif(
    not (shutil.which("as") and shutil.which("nm")), reason="needs binutils"
)
def test_entries_are_where_they_are_entered(tmp_path):
    """The offsets that registers are set to are those of the labels."""
    compiled = tmp_path / "code.o"
    subprocess.run(
        ["as", "-o", compiled, "-"],
        input=stub.SOURCE.replace("frame:", "frame_:")
        .replace("frame(", "frame_(")
        .replace("frame+", "frame_+"),
        text=True,
        check=True,
    )
    listed = subprocess.run(["nm", compiled], capture_output=True, text=True)
    labels = {
        words[2]: int(words[0], 16)
        for words in map(str.split, listed.stdout.splitlines())
    }
    assert labels["once"] == stub.ONCE
    assert labels["row"] == stub.ROW
    assert labels["frame_"] == len(stub.CODE)


def test_calls_that_stand_in_the_source_have_their_numbers():
    """The end of the stub restores the signal mask, by number."""
    leave = stub.SOURCE.partition("leave:")[2]
    assert f"mov ${libc.SYS['rt_sigprocmask']}, %eax" in leave
    assert f"mov ${calls.SIG_SETMASK}, %edi" in leave


# -- the frame


def registers(draw_from=WORD):
    return st.fixed_dictionaries(dict.fromkeys(NAMES, draw_from)).map(
        lambda values: Registers(**values)
    )


def places():
    """Read off the source which register comes back from where in the frame."""
    found = re.findall(r"mov frame\+(\d+)\(%rip\), %(r\w+)", stub.SOURCE)
    assert found[0] == ("8", "rax")  # the flags, by way of rax
    return {name: int(at) for at, name in found[1:]}


@given(registers(), WORD)
def test_each_register_is_where_the_code_takes_it_from(found, mask):
    """Offsets in the source against the frame, and the signal mask in front."""
    found.orig_rax = NO_CALL
    frame = stub.frame(found, mask)
    assert struct.unpack_from("<Q", frame)[0] == mask
    restored = {
        name: struct.unpack_from("<Q", frame, at)[0] for name, at in places().items()
    }
    assert restored == {name: getattr(found, name) for name in restored}
    assert struct.unpack_from("<Q", frame, 104)[0] == found.rip  # jmp *frame+104
    assert len(frame) == stub.BLOCKED_AT - len(stub.CODE)


def test_every_register_the_code_changes_is_restored():
    """What it names as a register is in the frame, the counter of the code too."""
    wide = {"eax": "rax", "al": "rax", "edi": "rdi", "edx": "rdx", "r10d": "r10"}
    named = {wide.get(name, name) for name in re.findall(r"%(\w+)", stub.SOURCE)}
    # `syscall` changes rcx and r11 (syscall(2)).
    assert named - {"rip"} | {"rcx", "r11"} == set(places())


def as_the_kernel_does(found):
    """Where a thread goes on, and with which rax, if no signal came."""
    result = -found.rax % 2**64
    if found.orig_rax != NO_CALL and result in AGAIN:
        return found.orig_rax, (found.rip - 2) % 2**64
    if found.orig_rax != NO_CALL and result == RESTART_BLOCK:
        return ptrace.NR_RESTART_SYSCALL, (found.rip - 2) % 2**64
    return found.rax, found.rip


RESULTS = st.one_of(
    WORD, st.sampled_from([-code % 2**64 for code in (4, 11, *range(510, 520))])
)


@given(registers(), RESULTS, st.one_of(WORD, st.just(NO_CALL)))
def test_interrupted_calls_begin_again(found, result, number):
    """And nothing else does: EINTR is for the program, a number may look alike."""
    found.rax, found.orig_rax = result, number
    found.rip = max(found.rip, 2)
    before = bytes(found)
    frame = stub.frame(found, 0)
    assert bytes(found) == before
    rax = struct.unpack_from("<Q", frame, places()["rax"])[0]
    rip = struct.unpack_from("<Q", frame, 104)[0]
    assert (rax, rip) == as_the_kernel_does(found)


@given(registers(), WORD, st.integers(-(2**63), 2**63 - 1))
def test_entering_changes_only_what_is_asked_for(found, at, value):
    """And tells the kernel that no system call is under way, to be begun again."""
    before = bytes(found)
    entered = stub.entering(found, at, rbx=value)
    assert bytes(found) == before
    assert (entered.rip, entered.orig_rax) == (at, NO_CALL)
    assert entered.rbx == value % 2**64
    entered.rip, entered.orig_rax, entered.rbx = found.rip, found.orig_rax, found.rbx
    assert bytes(entered) == before


# -- room


@given(st.integers(0, 8192), st.binary(min_size=1, max_size=64), WORD, WORD)
def test_a_stub_is_put_where_nothing_is_and_found_again(used, end, born, workspace):
    """Apart from what is used, and with its owner."""
    assume(end[-1] and used + len(end) <= 8192)
    content = (b"\xcc" * used + end).ljust(8192, b"\0")
    if used + len(end) + 32 + stub.SIZE > 8192:
        return  # hardly any room: either answer is right
    at, owner = stub.find(content)
    assert owner is None
    assert at % 16 == 0
    assert content[at - 16 : at + stub.SIZE] == bytes(16 + stub.SIZE)
    whose = stub.Owner(7, born, workspace)
    image = stub.image(whose)
    assert len(image) == stub.SIZE
    after = content[:at] + image + content[at + stub.SIZE :]
    assert len(after) == len(content)
    assert stub.find(after) == (at, whose)


@pytest.mark.parametrize("size", [0, 100, stub.SIZE - 1, stub.SIZE])
def test_there_may_be_no_room(size):
    """Neither in a page that is full nor in one that is too short."""
    for content in (b"\xcc" * size, bytes(size)):
        with pytest.raises(OSError, match="no room") as caught:
            stub.find(content)
        assert caught.value.errno == errno.ENOEXEC


# -- run for real, by a thread that uses every register

ENDLESS = b"\xeb\xfe"  # jmp to itself: touches neither registers nor the stack
GENERAL = [*NAMES[:15], "rsp"]
# Flags that a program can set: CF PF AF ZF SF DF OF.
FLAGS = (0, 2, 4, 6, 7, 10, 11)
PR_SET_PDEATHSIG = 1


def spin(tell):
    """Run `ENDLESS` in a page of its own that holds room for a stub."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
    rwx = libc.PROT_READ | libc.PROT_WRITE | libc.PROT_EXEC
    page = libc.mmap(None, 4096, rwx, flags, -1, 0)
    calls.ctypes.memmove(page, ENDLESS, len(ENDLESS))
    os.write(tell, struct.pack("<Q", page))
    calls.ctypes.CFUNCTYPE(None)(page)()


@pytest.fixture(scope="module")
def spinner():
    """A process that does nothing but jump, and where it does."""
    ready, tell = os.pipe()
    pid = start_child(lambda: spin(tell))
    os.close(tell)
    try:
        page = struct.unpack("<Q", os.read(ready, 8))[0]
        threads = Threads(pid)
        poll(lambda: where(threads) == page)
        yield threads, page
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def when_held(threads, work):
    """Hold the one thread; one that has no processor just now takes its time."""

    def attempt():
        with contextlib.suppress(BlockingIOError):
            return (threads.hold_one(work),)
        return None

    return poll(attempt)[0]


def where(threads):
    return when_held(threads, ptrace.registers).rip


def arithmetic(bits):
    return sum(1 << bit for bit, on in zip(FLAGS, bits, strict=True) if on)


@pytest.mark.needs(Feature.PTRACE_SEIZE)
@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(WORD, min_size=16, max_size=16),
    st.lists(st.booleans(), min_size=7, max_size=7),
    WORD,
    st.booleans(),
)
def test_registers_flags_and_mask_come_back_by_themselves(
    spinner, values, bits, mask, once
):
    """The tracer lets go at once: what the thread is afterwards, the stub made.

    By either entry, with whatever was in its registers, in its flags and blocked.
    """
    threads, page = spinner
    code = page + 64

    def send(tid):
        found = ptrace.registers(tid)
        for name, value in zip(GENERAL, values, strict=True):
            setattr(found, name, value)
        found.eflags = found.eflags & ~arithmetic([True] * 7) | arithmetic(bits)
        found.rip = page
        ptrace.set_registers(tid, found)
        found = ptrace.registers(tid)
        ptrace.set_signal_mask(tid, 0)
        ptrace.poke(tid, code, stub.image(stub.Owner(0, 0, 0)))
        ptrace.poke(tid, code + len(stub.CODE), stub.frame(found, mask))
        if once:
            changed = {"rax": libc.SYS["close"], "rdi": -1}
            entered = stub.entering(found, code + stub.ONCE, **changed)
        else:
            entered = stub.entering(found, code + stub.ROW, rbx=0, rbp=0)
        ptrace.set_registers(tid, entered)
        return found

    found = when_held(threads, send)
    poll(lambda: where(threads) == page)
    after, blocked = when_held(
        threads, lambda tid: (ptrace.registers(tid), ptrace.signal_mask(tid))
    )
    unblockable = 1 << signal.SIGKILL - 1 | 1 << signal.SIGSTOP - 1
    assert blocked == mask & ~unblockable
    after.orig_rax = found.orig_rax
    differing = {
        name: (hex(getattr(found, name)), hex(getattr(after, name)))
        for name in NAMES
        if getattr(found, name) != getattr(after, name)
    }
    assert differing == {}
