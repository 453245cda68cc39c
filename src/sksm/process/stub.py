"""Code that a thread of another process runs for us, and then forgets.

Whoever sets a thread's registers and is killed before he sets them back kills the
process. So nobody sets them back here: the stub ends by restoring, from a frame
behind it, all that it changed, and goes on where the thread was. To send a thread
into it is one step, and once that is taken it needs nobody.

It lies in the unused end of the vdso's last page, which every process has, may
run and will never use. It keeps away from the stack (a signal may be delivered on
it), from the vector registers and from the segments.
"""

from __future__ import annotations

import dataclasses
import errno
import struct

from sksm.linux import calls, ptrace
from sksm.linux.ptrace import Registers

# A thread enters at `once`, for one system call whose arguments are in place, or
# at `row`, with rbx at the first row of a table (`calls.CALL`) and rbp behind the
# last; every row is a system call. Signals are blocked, but for the first
# instructions, by the first call; `leave` restores the mask and the registers. The
# overflow flag comes back by an addition, the other five by sahf.
SOURCE = """
    once:
        syscall
        jmp leave
    row:
        cmp %rbp, %rbx
        jae leave
        mov (%rbx), %rax
        mov 8(%rbx), %rdi
        mov 16(%rbx), %rsi
        mov 24(%rbx), %rdx
        mov 32(%rbx), %r10
        mov 40(%rbx), %r8
        mov 48(%rbx), %r9
        syscall
        mov %rax, 72(%rbx)
        cmp 56(%rbx), %rax
        jne otherwise
        add $80, %rbx
        jmp row
    otherwise:
        mov 64(%rbx), %rbx
        jmp row
    leave:
        mov $14, %eax
        mov $2, %edi
        lea frame(%rip), %rsi
        xor %edx, %edx
        mov $8, %r10d
        syscall
        mov frame+8(%rip), %rax
        add $0x7f, %al
        sahf
        mov frame+16(%rip), %rax
        mov frame+24(%rip), %rbx
        mov frame+32(%rip), %rcx
        mov frame+40(%rip), %rdx
        mov frame+48(%rip), %rsi
        mov frame+56(%rip), %rdi
        mov frame+64(%rip), %rbp
        mov frame+72(%rip), %r8
        mov frame+80(%rip), %r9
        mov frame+88(%rip), %r10
        mov frame+96(%rip), %r11
        jmp *frame+104(%rip)
        .balign 8
    frame:
"""
# What `as` makes of it (tests/process/test_stub.py asks it).
CODE = bytes.fromhex(
    "0f05eb384839eb7333488b03488b7b08488b7310488b53184c8b53204c8b4328"
    "4c8b4b300f0548894348483b433875064883c350ebce488b5b40ebc8b80e0000"
    "00bf02000000488d356b00000031d241ba080000000f05488b0562000000047f"
    "9e488b0560000000488b1d61000000488b0d62000000488b1563000000488b35"
    "64000000488b3d65000000488b2d660000004c8b05670000004c8b0d68000000"
    "4c8b15690000004c8b1d6a000000ff256c0000000f1f4000"
)
ONCE, ROW = 0, 4  # offsets of the two entries
_FRAME = struct.Struct("<14Q")
_TAIL = struct.Struct("<4Q")  # signals to block, and an `Owner`
BLOCKED_AT = len(CODE) + _FRAME.size
WORKSPACE_AT = BLOCKED_AT + 24
SIZE = BLOCKED_AT + _TAIL.size
MARK = 32  # so many bytes of CODE are found nowhere else

# Registers of a stub's frame, in its order, behind the signal mask and the flags.
_SAVED = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11")
_OVERFLOW = 1 << 11
_MINUS_ONE = 2**64 - 1  # in orig_rax: no system call is under way
_AS_IT_WAS = (ptrace.ERESTARTSYS, ptrace.ERESTARTNOINTR, ptrace.ERESTARTNOHAND)


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """Who put a stub there."""

    pid: int
    born: int  # in ticks since the machine started, as /proc/PID/stat has it
    workspace: int


def image(owner: Owner) -> bytes:
    """Give all of the stub, for nobody yet."""
    tail = _TAIL.pack(calls.BLOCKED, owner.pid, owner.born, owner.workspace)
    return CODE + bytes(_FRAME.size) + tail


def find(content: bytes) -> tuple[int, Owner | None]:
    """Find a stub, or room for one, at the end of a page's content.

    Returns:
        Where it is, and whose.

    Raises:
        OSError: ENOEXEC if there is neither.
    """
    at = content.find(CODE[:MARK])  # all of it, unless its owner was killed just then
    if at >= 0:
        _, *owner = _TAIL.unpack_from(content, at + BLOCKED_AT)
        return at, Owner(*owner)
    used = len(content.rstrip(b"\0"))
    at = -(-used // 16) * 16 + 16
    if at + SIZE > len(content):
        raise OSError(errno.ENOEXEC, "no room at the end of its vdso")
    return at, None


def frame(found: Registers, mask: int) -> bytes:
    """Write down what `leave` restores: registers, and the signals to block.

    A system call that the stop interrupted is started again, as the kernel would
    do if no signal had come (arch/x86/kernel/signal.c).
    """
    after = found.copy()
    if found.orig_rax != _MINUS_ONE:
        result = -found.rax % 2**64
        if result in _AS_IT_WAS:
            after.rax, after.rip = found.orig_rax, found.rip - 2
        elif result == ptrace.ERESTART_RESTARTBLOCK:
            after.rax, after.rip = ptrace.NR_RESTART_SYSCALL, found.rip - 2
    flags = int(bool(after.eflags & _OVERFLOW)) | (after.eflags & 0xFF) << 8
    saved = (getattr(after, name) for name in _SAVED)
    return _FRAME.pack(mask, flags, *saved, after.rip)


def entering(found: Registers, at: int, **changed: int) -> Registers:
    """Give the registers with which a thread enters a stub at `at`."""
    wanted = found.copy()
    wanted.rip, wanted.orig_rax = at, _MINUS_ONE
    for name, value in changed.items():
        setattr(wanted, name, value % 2**64)
    return wanted
