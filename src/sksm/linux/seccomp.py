"""What a process's seccomp filters would say to a system call: linux/seccomp.h.

A filter is a program for the machine of linux/filter.h, less what
`seccomp_check_filter` (kernel/seccomp.c) does not let in. The kernel has no way of
asking one, so it is read and run here.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import enum
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from ctypes import Structure, c_int, c_long, c_uint32, c_uint64, c_void_p

import numpy as np
import numpy.typing as npt

from sksm.linux import libc

PTRACE_SECCOMP_GET_FILTER = 0x420C  # linux/ptrace.h, since 4.4

# linux/audit.h: EM_*, with the marks of 64 bits and of little endian.
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[os.uname().machine]

# struct sock_filter.
INSTRUCTION = np.dtype([("code", "<u2"), ("jt", "u1"), ("jf", "u1"), ("k", "<u4")])
Filter = npt.NDArray[np.void]


class seccomp_data(Structure):
    _fields_ = (
        ("nr", c_int),
        ("arch", c_uint32),
        ("instruction_pointer", c_uint64),
        ("args", c_uint64 * 6),
    )


class Action(enum.IntEnum):
    """`SECCOMP_RET_*`: what becomes of a system call."""

    KILL_PROCESS = 0x80000000
    KILL_THREAD = 0
    TRAP = 0x00030000
    ERRNO = 0x00050000
    USER_NOTIF = 0x7FC00000
    TRACE = 0x7FF00000
    LOG = 0x7FFC0000
    ALLOW = 0x7FFF0000


_ACTION_FULL = 0xFFFF0000


class Class(enum.IntEnum):
    """The lowest bits of an instruction's code (linux/bpf_common.h)."""

    LD, LDX, ST, STX, ALU, JMP, RET, MISC = range(8)


# What the other bits mean, class by class.
BPF_IMM, BPF_ABS, BPF_MEM, BPF_LEN = 0x00, 0x20, 0x60, 0x80
BPF_ADD, BPF_SUB, BPF_MUL, BPF_DIV, BPF_OR, BPF_AND = range(0x00, 0x60, 0x10)
BPF_LSH, BPF_RSH, BPF_NEG, BPF_XOR = 0x60, 0x70, 0x80, 0xA0
BPF_JA, BPF_JEQ, BPF_JGT, BPF_JGE, BPF_JSET = range(0x00, 0x50, 0x10)
BPF_X = 0x08  # the other operand is X; 0: it is `k`
BPF_A, BPF_TXA = 0x10, 0x80
BPF_MEMWORDS = 16
BPF_MAXINSNS = 4096

_CLASS, _MODE, _OPERATION = 0x07, 0xE0, 0xF0
_WORD = 0xFFFFFFFF

_ALU: dict[int, Callable[[int, int], int]] = {
    BPF_ADD: operator.add,
    BPF_SUB: operator.sub,
    BPF_MUL: operator.mul,
    BPF_DIV: operator.floordiv,
    BPF_OR: operator.or_,
    BPF_AND: operator.and_,
    BPF_XOR: operator.xor,
    # Only the lowest five bits of a distance count (kernel/bpf/core.c, `SHT`).
    BPF_LSH: lambda a, other: a << (other & 31),
    BPF_RSH: lambda a, other: a >> (other & 31),
    BPF_NEG: lambda a, _: -a,
}
_JUMPS: dict[int, Callable[[int, int], object]] = {
    BPF_JEQ: operator.eq,
    BPF_JGT: operator.gt,
    BPF_JGE: operator.ge,
    BPF_JSET: operator.and_,
}


def verdict(
    filters: Iterable[Filter],
    number: int,
    args: Sequence[int] = (),
    *,
    arch: int = AUDIT_ARCH,
    at: int = 0,
) -> Action:
    """Say what becomes of a system call under all of `filters`.

    Args:
        filters: as `read_filters` gives them.
        number: of the system call.
        args: its arguments; those left out are 0.
        arch: AUDIT_ARCH_*, of the instruction that enters the kernel.
        at: the address behind that instruction. Few filters look at it.

    Returns:
        The most restrictive action, in the order of the kernel, to which one that
        it does not know is `KILL_PROCESS`. Without filters, `ALLOW`.
    """
    data = seccomp_data(number, arch, at, (c_uint64 * 6)(*args))
    words = np.frombuffer(bytes(data), "<u4").tolist()
    answers = (_run(program, words) & _ACTION_FULL for program in filters)
    return min(map(_known, answers), key=_as_signed, default=Action.ALLOW)


def _known(answer: int) -> Action:
    try:
        return Action(answer)
    except ValueError:
        return Action.KILL_PROCESS


def _as_signed(action: Action) -> int:
    return action - (1 << 32) if action >> 31 else action


def read_filters(tid: int) -> list[Filter]:
    """Read the filters of a thread that is stopped, the oldest first.

    Raises:
        OSError: EACCES without CAP_SYS_ADMIN, or under a filter ourselves; EINVAL
            if it has none, or without CONFIG_CHECKPOINT_RESTORE; ESRCH if it does
            not stand still for us.
    """
    found: list[Filter] = []
    room = np.zeros(BPF_MAXINSNS, INSTRUCTION)
    with contextlib.suppress(FileNotFoundError):  # ENOENT: no more
        while True:
            # SAFETY: a filter has no more instructions than there is room for.
            size = _ptrace(PTRACE_SECCOMP_GET_FILTER, tid, len(found), room.ctypes.data)
            found.append(room[:size].copy())
    return found


_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = (c_long, c_int, c_void_p, c_void_p)
_ptrace.restype = c_long
_ptrace.errcheck = libc.raise_on_failure


@dataclasses.dataclass(slots=True)
class _Machine:
    """The registers and memory of a filter that runs."""

    words: list[int]  # struct seccomp_data
    a: int = 0
    x: int = 0
    memory: list[int] = dataclasses.field(default_factory=lambda: [0] * BPF_MEMWORDS)

    def load(self, code: int, k: int) -> int:
        mode = code & _MODE
        if mode == BPF_ABS:
            return self.words[k // 4]
        if mode == BPF_MEM:
            return self.memory[k]
        return ctypes.sizeof(seccomp_data) if mode == BPF_LEN else k

    def step(self, code: int, k: int) -> None:
        """Do what an instruction does that neither jumps nor returns."""
        match code & _CLASS:
            case Class.LD:
                self.a = self.load(code, k)
            case Class.LDX:
                self.x = self.load(code, k)
            case Class.ST:
                self.memory[k] = self.a
            case Class.STX:
                self.memory[k] = self.x
            case Class.ALU:
                operand = self.x if code & BPF_X else k
                self.a = _ALU[code & _OPERATION](self.a, operand) & _WORD
            case Class.MISC:
                if code & BPF_TXA:
                    self.a = self.x
                else:
                    self.x = self.a


def _run(program: Filter, words: list[int]) -> int:
    """Run one filter to the value that it returns."""
    machine = _Machine(words)
    rows = program.tolist()
    at = 0
    while True:
        code, jt, jf, k = rows[at]
        at += 1
        kind = code & _CLASS
        if kind == Class.RET:
            return machine.a if code & BPF_A else k
        if kind != Class.JMP:
            try:
                machine.step(code, k)
            except ZeroDivisionError:  # by X: the program ends with 0
                return 0
        elif code & _OPERATION == BPF_JA:
            at += k
        else:
            operand = machine.x if code & BPF_X else k
            at += jt if _JUMPS[code & _OPERATION](machine.a, operand) else jf
