"""Several calls in a row, with the interpreter out of the way.

Memory that is write-protected through a userfaultfd makes its writers wait. A
writer may hold the interpreter's lock, and then Python code that means to end
the protection never runs again. So everything between protecting and releasing
is written down first, as a table of calls, and carried out by sixty lines of
machine code in one ctypes call, which needs no lock. It also saves the 1 us that
ctypes takes for each call.

The calling conventions are those of the System V ABI, x86-64, and syscall(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import functools
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sksm.linux import libc

# One call. `function` is an address, or a system call's number if below 4096.
# Where its result is not `want`, the row at address `otherwise` comes next.
CALL = np.dtype(
    [
        ("function", "<u8"),
        ("args", "<u8", 6),
        ("want", "<i8"),
        ("otherwise", "<u8"),
        ("result", "<i8"),  # out; of a system call, -errno on failure
    ]
)

# In: rdi = first row, rsi = end of the table. r10 against rcx is the difference
# between the two conventions; a function's result is an int, hence movslq.
SOURCE = {
    "x86_64": """
        endbr64
        push %rbx
        push %rbp
        push %r12
        mov %rdi, %rbx
        mov %rsi, %rbp
    row:
        cmp %rbp, %rbx
        jae done
        mov (%rbx), %rax
        mov 8(%rbx), %rdi
        mov 16(%rbx), %rsi
        mov 24(%rbx), %rdx
        mov 32(%rbx), %r10
        mov 40(%rbx), %r8
        mov 48(%rbx), %r9
        cmp $4096, %rax
        jae function
        syscall
        jmp compare
    function:
        mov %r10, %rcx
        call *%rax
        movslq %eax, %rax
    compare:
        mov %rax, 72(%rbx)
        cmp 56(%rbx), %rax
        jne otherwise
        add $80, %rbx
        jmp row
    otherwise:
        mov 64(%rbx), %rbx
        jmp row
    done:
        pop %r12
        pop %rbp
        pop %rbx
        ret
    """
}
# What `as` makes of it (tests/linux/test_calls.py asks it).
CODE = {
    "x86_64": bytes.fromhex(
        "f30f1efa535541544889fb4889f54839eb7345488b03488b7b08488b7310488b"
        "53184c8b53204c8b43284c8b4b30483d0010000073040f05eb084c89d1ffd048"
        "63c048894348483b433875064883c350ebbc488b5b40ebb6415c5d5bc3"
    )
}

# Signals that a fault of our own would raise: blocking them would turn a bug's
# message into silence.
_FAULTS = (4, 5, 7, 8, 11, 31)  # ILL TRAP BUS FPE SEGV SYS
SIG_SETMASK = 2
BLOCKED = 2**64 - 1 - sum(1 << (number - 1) for number in _FAULTS)
ZEROS_BYTES = 1 << 18
_WANT, OTHERWISE, RESULT = 7, 8, 9  # words of a CALL
_SKIPPED = np.iinfo(np.int64).min


@dataclasses.dataclass(frozen=True, slots=True)
class Results:
    """How a call list went, row by row: three arrays of shape (rows,)."""

    results: npt.NDArray[np.int64]  # of a failed system call, -errno
    ran: npt.NDArray[np.bool_]
    met: npt.NDArray[np.bool_]  # ran, with the result that was wanted


class Home(Protocol):
    """Where a call list is carried out, and where what it points to lies."""

    pid: int
    compare: int  # a `function` that does what memcmp does
    zeros: int  # the address of `ZEROS_BYTES` zeros
    fixed: int  # MAP_FIXED, or MAP_FIXED_NOREPLACE where addresses are not reserved

    def place(self, data: npt.NDArray[Any]) -> int:
        """Give the address that a copy of `data` has while the list runs."""
        ...

    def carry_out(self, rows: npt.NDArray[np.int64]) -> None:
        """Work off rows of ten words, in which `otherwise` is an index.

        Signals are blocked from first to last, so that no handler meets memory
        that only this list could release.
        """
        ...


class CallList:
    """A table of calls under construction; `run` carries it out.

    Rows are added in order. Inside `block` a row whose result is not the one
    wanted ends the block: the rest of it is skipped, what follows is not.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self._rows: list[list[int]] = []  # ten words a row, as in CALL

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Group rows: the first that fails skips the others."""
        first = len(self._rows)
        yield
        for row in self._rows[first:]:
            row[OTHERWISE] = len(self._rows)

    def call(self, function: int, *args: int, want: int = 0) -> int:
        """Add a call of `function`, at an address or by number. Gives its row."""
        unused = (0,) * (6 - len(args))
        self._rows.append([function, *args, *unused, want, len(self._rows) + 1, 0])
        return len(self) - 1

    def syscall(self, name: str, *args: int, want: int = 0) -> int:
        """Add a system call by its name in `libc.SYS`. Gives its row."""
        return self.call(libc.SYS[name], *args, want=want)

    def otherwise(self, row: int, there: int) -> None:
        """Go on at another row, or behind the last, if `row` has another result."""
        self._rows[row][OTHERWISE] = there

    def __len__(self) -> int:
        return len(self._rows)

    def words(self) -> npt.NDArray[np.int64]:
        """Give the table, with `otherwise` as an index."""
        words = np.array(self._rows, np.int64).reshape(-1, 10)
        words[:, RESULT] = _SKIPPED
        return words

    def run(self) -> Results:
        """Carry the table out and say how it went."""
        words = self.words()
        self.home.carry_out(words)
        results = words[:, RESULT]
        return Results(results, results != _SKIPPED, results == words[:, _WANT])


class Here:
    """This process, in which a list runs without the interpreter if it can."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.compare = libc.address_of("memcmp")
        self.zeros = _zeros()
        self.fixed = libc.MAP_FIXED
        self._placed: list[npt.NDArray[Any]] = []

    def place(self, data: npt.NDArray[Any]) -> int:
        """Give the address of `data` itself, kept alive."""
        self._placed.append(data)
        return int(data.ctypes.data)

    def carry_out(self, rows: npt.NDArray[np.int64]) -> None:
        """Work the rows off between blocking signals and letting them in again."""
        masks = np.array([BLOCKED, 0], "<u8")
        mask, held = masks.ctypes.data, masks.ctypes.data + 8
        words = np.zeros((len(rows) + 2, 10), np.int64)
        words[0] = [
            libc.SYS["rt_sigprocmask"],
            SIG_SETMASK,
            mask,
            held,
            8,
            0,
            0,
            0,
            0,
            0,
        ]
        words[1:-1] = rows
        words[-1] = [libc.SYS["rt_sigprocmask"], SIG_SETMASK, held, 0, 8, 0, 0, 0, 0, 0]
        words[1:-1, OTHERWISE] += 1
        words[[0, -1], OTHERWISE] = 1, len(words)
        to_addresses(words, words.ctypes.data)
        execute(words.view(CALL)[:, 0])
        rows[:, RESULT] = words[1:-1, RESULT]


@functools.cache
def _zeros() -> int:
    """Give the address of `ZEROS_BYTES` zeros: pages nobody ever writes."""
    area = mmap.mmap(-1, ZEROS_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _held_for_ever.append(area)
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


_held_for_ever: list[object] = []


def to_addresses(words: npt.NDArray[np.int64], table: int) -> None:
    """Turn `otherwise` from an index into the address it has in a table there."""
    words[:, OTHERWISE] *= CALL.itemsize
    words[:, OTHERWISE] += table


@functools.cache
def uninterrupted() -> bool:
    """Say whether a table runs without the interpreter on this machine.

    Where it does not (no code for this processor, or executable memory is
    forbidden), a table is worked off row by row, and nothing in it may make a
    thread of this process wait.
    """
    try:
        _code()
    except (KeyError, OSError):
        return False
    return True


@functools.cache
def _code() -> Callable[[int, int], None]:
    code = CODE[os.uname().machine]
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    # SAFETY: a page of our own, read-only from here on, held by the closure.
    libc.mprotect(address, mmap.PAGESIZE, libc.PROT_READ | libc.PROT_EXEC)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(address)
    function.page = page  # type: ignore[attr-defined]
    return function


def execute(table: npt.NDArray[np.void]) -> None:
    """Work the rows of `table` off, filling in `result`."""
    if uninterrupted():
        # SAFETY: CallList made the table; its jumps go forward and stay inside.
        _code()(table.ctypes.data, table.ctypes.data + table.nbytes)
    else:
        execute_slowly(table)


def execute_slowly(table: npt.NDArray[np.void]) -> None:
    """Do what the machine code does, in Python: its reference, and its stand-in."""
    start, at = table.ctypes.data, 0
    while at < len(table):
        row = table[at]
        row["result"] = invoke(int(row["function"]), *map(int, row["args"]))
        if row["result"] == row["want"]:
            at += 1
        else:
            at = (int(row["otherwise"]) - start) // CALL.itemsize


def invoke(function: int, *args: int) -> int:
    """Make one call of a table; -errno for a system call that failed."""
    words = [ctypes.c_ulong(arg) for arg in args]
    if function >= 4096:
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_ulong] * 6)
        return int(prototype(function)(*words))
    raw = libc.raw_syscall(ctypes.c_long(function), *words)
    return int(raw) if raw != -1 else -(ctypes.get_errno() or errno.EINVAL)
