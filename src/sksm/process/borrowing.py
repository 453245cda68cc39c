"""Borrowing a thread of another process, and giving it back as it was."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator

import numpy as np

from sksm.linux import calls, libc, ptrace
from sksm.linux.ptrace import Registers
from sksm.process import stub
from sksm.process.reading import read_bytes
from sksm.process.stopping import Threads

# How long a thread that we set going may take to stop. It can, but other processes
# may have the processors; and until it has, nobody else may have the stub.
_PATIENCE_SECONDS = 10.0
_LOOKS_MS = 3  # milliseconds between two looks whether a signal came first
_LONGEST_SECONDS = 10.0  # of one table
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")


class Interrupted(Exception):
    """A signal came before the work began: let the thread go, and try again."""


class Thread:
    """A held thread that runs our stub for a while.

    Args:
        threads: those it is one of.
        tid: which, held.
        code: where the stub lies.

    Raises:
        OSError: ENOTSUP if it runs 32-bit code, or may not do what is to be done.
    """

    def __init__(self, threads: Threads, tid: int, code: int) -> None:
        threads.filters.require_harmless(tid)
        self._threads, self._tid, self._code = threads, tid, code
        self._found = ptrace.registers(tid)
        self._mask = ptrace.signal_mask(tid)
        if self._found.cs != ptrace.CODE_64_BIT:
            raise OSError(errno.ENOTSUP, "it runs 32-bit code")
        _leave_critical_section(threads.pid, tid, self._found)
        frame = stub.frame(self._found, self._mask)
        threads.write(tid, code + len(stub.CODE), frame)

    def block_signals(self) -> None:
        """Have the thread block all signals; the stub's end unblocks them."""
        blocked = self._code + stub.BLOCKED_AT
        self.call("rt_sigprocmask", calls.SIG_SETMASK, blocked, 0, 8)

    @contextlib.contextmanager
    def calling(self) -> Iterator[Thread]:
        """Make single calls inside the block; afterwards the thread is as it was."""
        try:
            yield self
        finally:
            with contextlib.suppress(ProcessLookupError):
                ptrace.interrupt(self._tid)
                with contextlib.suppress(ProcessLookupError):  # it runs, in a long call
                    ptrace.resume(self._tid)
                self._take_back()

    def call(self, name: str, *args: int) -> int:
        """Have the thread make one system call.

        Two stops, where the call begins and where it ends: if we are killed
        between them, the thread goes on into the stub's end. (A single step would
        leave it a trap to die of.)

        Raises:
            OSError: what the call says.
            Interrupted: see there.
        """
        given = dict(zip(_ARGUMENTS, args, strict=False))
        entry = self._code + stub.ONCE
        entered = stub.entering(self._found, entry, rax=libc.SYS[name], **given)
        ptrace.set_registers(self._tid, entered)
        for _ in range(2):
            self._run_to_syscall()
        result = struct.unpack("<q", struct.pack("<Q", self._now().rax))[0]
        if -4096 < result < 0:
            raise OSError(-result, f"{name}, in it: {os.strerror(-result)}")
        return int(result)

    def run(
        self, table: range, line: socket.socket, keeping: int | None = None
    ) -> None:
        """Have the thread work off a table, and take it back at the end of it.

        Args:
            table: the addresses of its rows.
            line: on which it says that it has begun, with signals blocked, and that
                it is at its end, where it waits.
            keeping: a descriptor to be passed on in between. It stays open until the
                thread has taken the message; but a thread that does not begin would
                leave it open for ever.
        """
        entry = self._code + stub.ROW
        entered = stub.entering(self._found, entry, rbx=table.start, rbp=table.stop)
        ptrace.set_registers(self._tid, entered)
        ptrace.resume(self._tid)
        self._hear(line, table)
        if keeping is not None:
            rights = array.array("i", [keeping])
            line.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        self._hear(line, table)
        ptrace.interrupt(self._tid)
        self._take_back()

    def _hear(self, line: socket.socket, table: range) -> None:
        line.settimeout(_LOOKS_MS / 1000)
        deadline = time.monotonic() + _LONGEST_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                if not line.recv(1):
                    raise ProcessLookupError(errno.ESRCH, "it has ended")
                return
            self._look_for_signals(table.start)
            if time.monotonic() > deadline:  # let it go as it is: it will restore
                raise BlockingIOError(errno.EBUSY, "what it does for us takes too long")

    def _look_for_signals(self, table: int) -> None:
        """Deal with a stop that a signal made before the table was at its end.

        The table blocks signals first of all, so either nothing is done yet, or it
        is SIGSTOP, which nobody can block: the thread goes on to the end, and is
        among the stopped ones then.
        """
        status = self._threads.look(self._tid)
        if status is None:
            return
        if not os.WIFSTOPPED(status):
            raise ProcessLookupError(errno.ESRCH, "it has ended")
        number = os.WSTOPSIG(status)
        if ptrace.event(status) == ptrace.PTRACE_EVENT_STOP:
            ptrace.resume(self._tid)
        elif number == signal.SIGSTOP:
            ptrace.resume(self._tid, number)
        elif self._now().rbx == table:
            self._put_off(number)
        else:
            middle = f"signal {number} in the middle of a table"
            raise BlockingIOError(errno.EBUSY, middle)

    def _run_to_syscall(self) -> None:
        ptrace.resume_to_syscall(self._tid)
        deadline = time.monotonic() + _LONGEST_SECONDS
        while True:
            status = self._threads.look(self._tid)
            if status is None:
                if time.monotonic() > deadline:
                    raise BlockingIOError(errno.EBUSY, "a call of it takes too long")
                time.sleep(0)
                continue
            if not os.WIFSTOPPED(status):
                raise ProcessLookupError(errno.ESRCH, "it has ended")
            number = os.WSTOPSIG(status)
            if number == ptrace.SYSCALL_STOP:
                return
            if ptrace.event(status) == ptrace.PTRACE_EVENT_STOP:
                ptrace.resume_to_syscall(self._tid)
            elif number == signal.SIGSTOP:
                ptrace.resume_to_syscall(self._tid, number)
            else:
                self._deliver(number)

    def _deliver(self, number: int) -> None:
        """Let the thread have a signal as if we had not come.

        Here the kernel still minds whether the signal ends a system call.
        """
        ptrace.set_registers(self._tid, self._found)
        ptrace.interrupt(self._tid)
        ptrace.resume(self._tid, number)
        self._threads.await_stop(self._tid, _PATIENCE_SECONDS)
        raise Interrupted

    def _put_off(self, number: int) -> None:
        """Let the thread have a signal when it is let go.

        Not now: the kernel writes its frame to the stack, and writers to that may
        be held off. It would wait with us, or end the process.
        """
        ptrace.set_registers(self._tid, self._found)
        self._threads.owed[self._tid] = number
        raise Interrupted

    def _take_back(self) -> None:
        """Restore the thread, which was asked to stop.

        Such a stop, other than that where a call ends, is one at which the kernel
        starts interrupted calls again.
        """
        if not self._threads.await_stop(self._tid, _PATIENCE_SECONDS):
            return
        if self._code <= self._now().rip < self._code + len(stub.CODE):
            ptrace.set_signal_mask(self._tid, self._mask)
            ptrace.set_registers(self._tid, self._found)

    def _now(self) -> Registers:
        return ptrace.registers(self._tid)


# The last of the general registers in a signal frame, as the kernel writes them
# (struct sigcontext): cs 0x33, gs 0, fs 0, ss 0x2b. Before it: rsp, rip, eflags.
_SEGMENTS = 0x2B << 48 | 0x33
_STACK_BYTES = 1 << 16  # to read at a time


def will_return(pid: int, tid: int, code: range) -> bool:
    """Say whether a held thread, in a signal handler, will return into the stub.

    The end of the stub unblocks signals, and only then restores the registers. If
    it was left to itself, one that was pending comes just there, and until its
    handler returns the stub and its frame must stay as they are.
    """
    stacks, seen = [ptrace.registers(tid).rsp], set[int]()
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        while stacks:
            at = stacks.pop() // 8 * 8
            while at not in seen:
                seen.add(at)
                try:
                    data = os.pread(memory.fileno(), _STACK_BYTES, at)
                except OSError:  # beyond the stack
                    break
                words = np.frombuffer(data[: len(data) // 8 * 8], np.uint64)
                for index in np.flatnonzero(words[3:] == _SEGMENTS).tolist():
                    rsp, rip = words[index : index + 2].tolist()
                    if rip in code:
                        return True
                    stacks.append(rsp)  # of the handler that this one interrupted
                at += _STACK_BYTES
    return False


_RSEQ_CS = 8  # offset of `rseq_cs` in struct rseq (include/uapi/linux/rseq.h)


def _leave_critical_section(pid: int, tid: int, found: Registers) -> None:
    """Abort a restartable sequence, as any preemption would (rseq(2)).

    The kernel does so only when it sees the thread return into one, and it will
    see it return into our stub.
    """
    if not (area := ptrace.rseq(tid)):
        return
    (section,) = struct.unpack("<Q", read_bytes(pid, area + _RSEQ_CS, 8))
    if section:
        _, _, start, size, abort = struct.unpack("<IIQQQ", read_bytes(pid, section, 32))
        if start <= found.rip < start + size:
            found.rip = abort
