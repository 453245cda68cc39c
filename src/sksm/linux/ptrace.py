"""Stopping threads of another process and setting their registers: ptrace(2).

Declarations: include/uapi/linux/ptrace.h and, for registers, sys/user.h. The
kernel binds a tracee to the thread that attached, so whatever begins with
`seize` ends in the same thread.

`PTRACE_SINGLESTEP` is left out on purpose: a tracer that is killed between the
step and its trap leaves the trap to the tracee, which dies of it.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_int, c_long, c_uint32, c_uint64, c_void_p
from errno import EBADF, EIO, ENOSYS

from sksm.linux import libc

PTRACE_CONT = 7
PTRACE_POKEDATA = 5
PTRACE_GETREGS, PTRACE_SETREGS = 12, 13
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
PTRACE_GETSIGMASK, PTRACE_SETSIGMASK = 0x420A, 0x420B
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F  # since 5.13
PTRACE_O_TRACESYSGOOD = 1
PTRACE_EVENT_STOP = 128

_KILLED = (os.CLD_KILLED, os.CLD_DUMPED)
WALL = 0x40000000  # __WALL: threads, too
SYSCALL_STOP = 5 | 0x80  # SIGTRAP, marked by PTRACE_O_TRACESYSGOOD

# What an interrupted system call returns to the kernel's own signal code
# (include/linux/errno.h); no program ever sees it.
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND = 512, 513, 514
ERESTART_RESTARTBLOCK = 516
NR_RESTART_SYSCALL = 219  # x86-64

CODE_64_BIT = 0x33  # what `cs` holds while 64-bit code runs


class Registers(ctypes.Structure):
    """struct user_regs_struct, x86-64."""

    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
            *("rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "eflags"),
            *("rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    )

    def copy(self) -> Registers:
        """Give registers that can be changed without changing these."""
        return Registers.from_buffer_copy(self)


class ptrace_rseq_configuration(ctypes.Structure):
    """What `PTRACE_GET_RSEQ_CONFIGURATION` tells."""

    _fields_ = (
        ("rseq_abi_pointer", c_uint64),
        ("rseq_abi_size", c_uint32),
        ("signature", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32),
    )


_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = (c_long, c_int, c_void_p, c_void_p)
_ptrace.restype = c_long
_ptrace.errcheck = libc.raise_on_failure


def seize(tid: int) -> None:
    """Become the tracer of a thread, which runs on."""
    _ptrace(PTRACE_SEIZE, tid, None, PTRACE_O_TRACESYSGOOD)


def interrupt(tid: int) -> None:
    """Ask a thread to stop; `wait` tells when it has."""
    _ptrace(PTRACE_INTERRUPT, tid, None, None)


def resume(tid: int, signal: int = 0) -> None:
    """Let a stopped thread run, delivering `signal` if it stopped because of one."""
    _ptrace(PTRACE_CONT, tid, None, signal)


def resume_to_syscall(tid: int, signal: int = 0) -> None:
    """Let a stopped thread run to where its next system call begins or ends."""
    _ptrace(PTRACE_SYSCALL, tid, None, signal)


def detach(tid: int, signal: int = 0) -> None:
    """Let go of a stopped thread, which runs on, with `signal` if that stopped it."""
    _ptrace(PTRACE_DETACH, tid, None, signal)


def registers(tid: int) -> Registers:
    """Read the registers of a stopped thread."""
    found = Registers()
    _ptrace(PTRACE_GETREGS, tid, None, ctypes.byref(found))
    return found


def set_registers(tid: int, wanted: Registers) -> None:
    """Set the registers of a stopped thread."""
    _ptrace(PTRACE_SETREGS, tid, None, ctypes.byref(wanted))


def signal_mask(tid: int) -> int:
    """Read which signals a stopped thread blocks; bit n - 1 is signal n."""
    mask = c_uint64()
    _ptrace(PTRACE_GETSIGMASK, tid, 8, ctypes.byref(mask))
    return mask.value


def set_signal_mask(tid: int, mask: int) -> None:
    """Set which signals a stopped thread blocks."""
    _ptrace(PTRACE_SETSIGMASK, tid, 8, ctypes.byref(c_uint64(mask)))


def rseq(tid: int) -> int:
    """Give the address of a stopped thread's struct rseq; 0 if it has none.

    Before Linux 5.13, or without CONFIG_RSEQ, none is known.
    """
    found = ptrace_rseq_configuration()
    size = ctypes.sizeof(found)
    try:
        _ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, ctypes.byref(found))
    except OSError as error:
        if error.errno != EIO:
            raise
        return 0
    return int(found.rseq_abi_pointer)


def poke(tid: int, address: int, data: bytes) -> None:
    """Write whole words into the memory of a stopped thread, read-only or not.

    A private page that may not be written is copied first, as for a breakpoint.
    """
    assert len(data) % 8 == 0
    for at in range(0, len(data), 8):
        word = int.from_bytes(data[at : at + 8], "little")
        _ptrace(PTRACE_POKEDATA, tid, address + at, word)


def wait(tid: int, *, reap: bool = True) -> int | None:
    """Give the status (waitpid(2)) of a thread that has stopped or ended.

    None while it runs. A stop is looked at and not taken, and can be looked at
    again until the thread runs: a thread that stopped for a signal loses it if the
    stop was taken (which clears `exit_code`) and its tracer then dies before it
    passes the signal on (`ptrace_signal` in kernel/signal.c).

    Args:
        tid: a thread that was seized.
        reap: take the status of one that ended. Whoever started it gets it after
            us, unless that was ourselves.
    """
    how = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT | WALL
    seen = os.waitid(os.P_PID, tid, how)
    if seen is None:
        return None
    if seen.si_code in (os.CLD_EXITED, *_KILLED):
        return os.waitpid(tid, WALL)[1] if reap else 0
    return seen.si_status << 8 | 0x7F  # as WIFSTOPPED and WSTOPSIG have it


def event(status: int) -> int:
    """Give the `PTRACE_EVENT_*` of a stop; 0 if a signal or a system call made it."""
    return status >> 16


_KCMP = {"x86_64": 312, "aarch64": 272}[os.uname().machine]
_KCMP_FILE = 0


def same_description(one: int, other: int) -> bool:
    """Say whether two descriptors of ours share one open file description (kcmp(2)).

    Without CONFIG_KCMP, by the locks of it that /proc shows (proc_pid_fdinfo(5)).
    """
    pid = os.getpid()
    try:
        return libc.syscall(_KCMP, pid, pid, _KCMP_FILE, one, other) == 0
    except OSError as error:
        if error.errno != ENOSYS:
            raise
    same = os.path.samestat(os.fstat(one), os.fstat(other))
    return same and _locks(one) == _locks(other)


def _locks(fd: int) -> list[str]:
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        return [line for line in lines if line.startswith("lock:")]


def same_file(pid: int, theirs: int, ours: int) -> bool:
    """Say whether a descriptor of a process is the same open file as one of ours.

    kcmp(2); without CONFIG_KCMP, by the name that /proc gives it.
    """
    try:
        return libc.syscall(_KCMP, os.getpid(), pid, _KCMP_FILE, ours, theirs) == 0
    except OSError as error:
        if error.errno == EBADF:
            return False
        if error.errno != ENOSYS:
            raise
    try:
        there = os.stat(f"/proc/{pid}/fd/{theirs}")
    except OSError:
        return False
    return os.path.samestat(there, os.fstat(ours))
