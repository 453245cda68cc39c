"""A foothold in another process: what call lists need there.

Three things are put into the process: the stub, in the vdso's unused end; a
workspace, one anonymous mapping for tables and copies; and one end of a socket. At
it the stub waits when a table is done, for us to take its thread back. If we are
killed, the socket wakes it, it tidies up, and restores its thread by itself.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sksm.errors import SksmError
from sksm.linux import calls, libc, ptrace
from sksm.process import stub, terrain
from sksm.process.borrowing import Interrupted, Thread, will_return
from sksm.process.reading import read_bytes, write_bytes
from sksm.process.stopping import Threads
from sksm.process.there import Image, framed, padded
from sksm.spans import HUGE_SIZE, PAGE_SIZE, Span

_IMAGE_BYTES = 1 << 18  # for a table and what it points to
_CONTROL_BYTES = 256  # in front of it: results of single calls, and then
_FAR_AT, _FAR = 32, struct.Struct("<qQ")  # the far end's descriptor and inode
_LENT_AT, _MOST_LENT = 64, 16  # the descriptors that we opened there
_OURS = ("anon_inode:[userfaultfd]", "/memfd:sksm-", "/dev/userfaultfd")
_FIRST_SPARE = 1 << 30  # from the workspace to addresses for what is under way
# How long the stub waits for us at the end of a table. We may have been stopped.
_PATIENCE = struct.pack("@ll", 2, 0)
_PAUSE_SECONDS = 0.1  # before trying again to leave
_PATIENT_TRIES = 5  # to stop all threads, at first
_TRIES = 20  # against signals that come first
_STEADY = "signals keep coming"
_T = TypeVar("_T")
_UNFINISHED = "what was begun there is not at its end"


class Foothold:
    """Carries out call lists in a process.

    Args:
        threads: of the process.
    """

    def __init__(self, threads: Threads) -> None:
        self.pid = threads.pid
        self.threads = threads
        self._vdso, self._hole = terrain.vdso_and_hole(threads.pid)
        at, self._before = self._found = self._find()
        self._code = self._vdso.start + at
        self.workspace = Span(self._hole.start, self._hole.start + _IMAGE_BYTES)
        self._spare = self._hole.start + _FIRST_SPARE
        # Pages that the kernel writes to whenever a thread goes on: with its struct
        # rseq. A barrier there would hold the thread that works for us.
        self.kernel_pages: frozenset[int] = frozenset()
        self._line: socket.socket | None = None
        self._far_end = -1  # of the line, a descriptor of the process
        self._lent: dict[int, int] = {}  # descriptors of the process, and ours
        self.astray = False  # a thread is in the stub that we have not taken back

    def _find(self) -> tuple[int, stub.Owner | None]:
        return stub.find(self._read(self._vdso.start, self._vdso.size))

    def _read(self, address: int, size: int) -> bytes:
        """Read bytes that are there as long as it executes the same program."""
        try:
            return read_bytes(self.pid, address, size)
        except OSError as error:
            raise terrain.another_program() from error

    # -- coming and going

    def establish(self) -> None:
        """Put everything in place.

        All threads are held: none must fork while both ends of the line are there.

        Raises:
            OSError: what ptrace, mmap or socketpair said.
            SksmError: another process of ours is at work there.
        """
        if self._before and terrain.lives(self._before):
            other = f"process {self._before.pid} is merging it"
            raise SksmError(f"process {self.pid}: {other}")
        patience = _PATIENT_TRIES
        for _ in range(_TRIES):
            try:
                self.threads.hold_all(self._install)
                return
            except Interrupted:
                continue
            except BlockingIOError:
                if not (patience := patience - 1):
                    raise
                time.sleep(_PAUSE_SECONDS)
        raise BlockingIOError(errno.EBUSY, _STEADY)

    def _install(self, held: list[int]) -> None:
        addresses = (ptrace.rseq(tid) for tid in held)
        self.kernel_pages = frozenset(at // PAGE_SIZE for at in addresses if at)
        me = stub.Owner(os.getpid(), terrain.born(os.getpid()), self.workspace.start)
        # Until what is left of one before is cleared away, it has to be found again.
        heir = dataclasses.replace(self._before or me, pid=me.pid, born=me.born)
        moved = terrain.vdso_address(self.pid) != self._vdso.start
        known = (self._before, heir, me)
        if moved or self._find() not in [(self._found[0], owner) for owner in known]:
            raise terrain.another_program()
        inside = range(self._code, self._code + len(stub.CODE))
        if any(ptrace.registers(tid).rip in inside for tid in held) or (
            self._before and any(will_return(self.pid, tid, inside) for tid in held)
        ):
            raise BlockingIOError(errno.EBUSY, _UNFINISHED)
        self.threads.filters.require_harmless(held[0])
        self.threads.write(held[0], self._code, stub.image(heir))
        try:
            with Thread(self.threads, held[0], self._code).calling() as thread:
                thread.block_signals()
                if self._before:
                    self._clear_away(thread, self._before.workspace)
                    mine = struct.pack("<Q", me.workspace)
                    at = self._code + stub.WORKSPACE_AT
                    self.threads.write(held[0], at, mine)
                self._furnish(thread)
        except OSError:
            with contextlib.suppress(OSError):  # it has ended, or could not be held
                if ptrace.registers(held[0]).rip not in inside:
                    self._erase(held[0])
            raise

    def _furnish(self, thread: Thread) -> None:
        """Make the workspace and the line, or nothing."""

        def undo(name: str, *args: int) -> None:
            with contextlib.suppress(OSError):
                thread.call(name, *args)

        where = (self.workspace.start, self.workspace.size)
        rw = libc.PROT_READ | libc.PROT_WRITE
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_FIXED_NOREPLACE
        with contextlib.ExitStack() as failed:
            thread.call("mmap", *where, rw, flags, -1, 0)
            failed.callback(undo, "munmap", *where)
            kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
            thread.call("socketpair", socket.AF_UNIX, kind, 0, where[0])
            near, far = struct.unpack("<2i", read_bytes(self.pid, where[0], 8))
            failed.callback(undo, "close", far)
            try:
                line = socket.socket(fileno=self.fetch(near))
            finally:
                thread.call("close", near)
            failed.callback(line.close)
            ours = self.fetch(far)
            failed.callback(os.close, ours)
            with socket.socket(fileno=os.dup(ours)) as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)
            kept = _FAR.pack(far, os.fstat(ours).st_ino)
            write_bytes(self.pid, self.workspace.start + _FAR_AT, kept)
            failed.pop_all()
        self._line, self._far_end = line, far
        self._lent[far] = ours

    def _clear_away(self, thread: Thread, workspace: int) -> None:
        """Take out what one of us left who was killed between two tables."""
        with contextlib.suppress(OSError):  # it took it out itself
            kept = read_bytes(self.pid, workspace, _CONTROL_BYTES)
            far_end, inode = _FAR.unpack_from(kept, _FAR_AT)
            if self._link(far_end) == f"socket:[{inode}]":
                thread.call("close", far_end)
            for fd in struct.unpack_from(f"<{_MOST_LENT}i", kept, _LENT_AT):
                if fd and self._link(fd).startswith(_OURS):
                    thread.call("close", fd)
            thread.call("munmap", workspace, self.workspace.size)

    def _link(self, fd: int) -> str:
        """Give what a descriptor of the process is; "" if there is none."""
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/{self.pid}/fd/{fd}")
        return ""

    def leave(self) -> None:
        """Take everything out again, if it is still there.

        A thread that we could not take back needs the stub, and tidies up itself.
        """
        if self._line is None:
            return
        try:
            for _ in range(0 if self.astray else _TRIES):
                with contextlib.suppress(Interrupted, BlockingIOError):
                    self.threads.hold_all(self._uninstall)
                    return
                time.sleep(_PAUSE_SECONDS)
        finally:
            self._line.close()
            self._line = None
            for fd in self._lent.values():
                os.close(fd)

    def _uninstall(self, held: list[int]) -> None:
        self._verify()
        tid = held[0]
        with Thread(self.threads, tid, self._code).calling() as thread:
            thread.block_signals()
            for fd in self._lent:
                thread.call("close", fd)
            thread.call("munmap", self.workspace.start, self.workspace.size)
        self._erase(tid)

    def _erase(self, tid: int) -> None:
        """Clear the stub; until that is done, it is found by its beginning."""
        rest = bytes(stub.SIZE - stub.MARK)
        self.threads.write(tid, self._code + stub.MARK, rest)
        self.threads.write(tid, self._code, bytes(stub.MARK))

    def _verify(self) -> None:
        """See that all is as we left it: the program, and its descriptors.

        Raises:
            ProcessLookupError: it executes another program now.
            OSError: EBADF if it has closed descriptors that it did not open.
        """
        self._verify_program()
        for theirs, ours in self._lent.items():
            if not ptrace.same_file(self.pid, theirs, ours):
                self._verify_program()
                if not self._link(theirs) and self._ends():
                    raise ProcessLookupError(errno.ESRCH, "it is about to end")
                raise OSError(errno.EBADF, "it closed descriptors it did not open")

    def _ends(self) -> bool:
        """Say whether it has no descriptors any more: the end has begun."""
        with contextlib.suppress(OSError):
            return not os.listdir(f"/proc/{self.pid}/fd")
        return True

    def _verify_program(self) -> None:
        if self._read(self._code, len(stub.CODE)) != stub.CODE:
            raise terrain.another_program()

    # -- descriptors

    def fetch(self, fd: int) -> int:
        """Make our own descriptor of what is `fd` in the process."""
        process = os.pidfd_open(self.pid)
        try:
            return libc.syscall(libc.SYS["pidfd_getfd"], process, fd, 0)
        except OSError:
            self._verify_program()
            raise
        finally:
            os.close(process)

    def lend(self, fd: int) -> int:
        """Make a descriptor in the process of our own `fd`; gives its number.

        Through the line, which needs no common directory, uid or namespace.
        """
        return self.have(lambda thread: self.receive(thread, fd))

    def receive(self, thread: Thread, fd: int) -> int:
        """Have a thread take a descriptor of ours; gives its number there.

        Raises:
            OSError: EMFILE if its table of open files is full.
        """
        assert self._line is not None
        at = self.image_start
        control = socket.CMSG_SPACE(4)
        # struct msghdr: name, its length, vectors, control data, flags; a vector of
        # one byte; the byte; and room for the descriptor.
        vector, byte, into = at + 56, at + 72, at + 80
        words = (0, 0, vector, 1, into, control, 0, byte, 1, 0)
        write_bytes(self.pid, at, struct.pack("<10Q", *words) + bytes(control))
        ancillary = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
        self._line.sendmsg([b"."], [ancillary])
        try:
            thread.call("recvmsg", self._far_end, at, socket.MSG_CMSG_CLOEXEC)
        finally:  # what it could not take must not be taken for something else later
            self._drain()
        received = self._read(into, control)
        if struct.unpack_from("<Q", received)[0] < socket.CMSG_LEN(4):
            raise OSError(errno.EMFILE, "its table of open files is full")
        (number,) = struct.unpack_from("<i", received, socket.CMSG_LEN(0))
        self._lend(number, os.dup(fd))
        return int(number)

    def _drain(self) -> None:
        """Take back what we sent and the process has not received."""
        far = socket.socket(fileno=os.dup(self._lent[self._far_end]))
        with far, contextlib.suppress(BlockingIOError):
            far.recv(1, socket.MSG_DONTWAIT)

    def take(self, thread: Thread, fd: int) -> int:
        """Make what is `fd` in the process ours alone; gives our own number."""
        ours = self.fetch(fd)
        self._lend(fd, os.dup(ours))
        try:
            self.give_back(thread, fd)
        except BaseException:
            os.close(ours)
            raise
        return ours

    def give_back(self, thread: Thread, fd: int) -> None:
        """Close what was lent as `fd`."""
        thread.call("close", fd)
        os.close(self._lent.pop(fd))

    def _lend(self, theirs: int, ours: int) -> None:
        self._lent[theirs] = ours
        numbers = [fd for fd in self._lent if fd != self._far_end][:_MOST_LENT]
        kept = struct.pack(f"<{len(numbers)}i", *numbers)
        try:
            write_bytes(self.pid, self.workspace.start + _LENT_AT, kept)
        except OSError as error:
            raise terrain.another_program() from error

    # -- single calls, and call lists

    def have(self, work: Callable[[Thread], _T]) -> _T:
        """Hold a thread, and do with it what takes single calls.

        Should we be killed meanwhile, what it was doing is not undone.

        Args:
            work: done once, but for signals that come before its first call.
        """
        if self.astray:
            raise BlockingIOError(errno.EBUSY, _UNFINISHED)

        def borrow(tid: int) -> _T:
            self._verify()
            thread = Thread(self.threads, tid, self._code)
            try:
                with thread.calling():
                    thread.block_signals()
                    return work(thread)
            except BlockingIOError:
                self.astray = True
                raise

        for _ in range(_TRIES):
            with contextlib.suppress(Interrupted):
                return self.threads.hold_one(borrow)
        raise BlockingIOError(errno.EBUSY, _STEADY)

    def spare(self, size: int, like: int) -> int:
        """Give addresses where the process has nothing mapped, for one use.

        They are as far into a page table as `like`, so that whole ones can move.
        """
        at = self._spare + (like - self._spare) % HUGE_SIZE
        if at + size > self._hole.stop:
            self._spare = self._hole.start + _FIRST_SPARE
            return self.spare(size, like)
        self._spare = at + size
        return at

    def carry_out(
        self,
        placed: Image,
        rows: npt.NDArray[np.int64],
        held: Sequence[int] = (),
        keeping: int | None = None,
    ) -> None:
        """Work off `rows` in the process, filling in their results.

        Args:
            placed: what the rows point to, from `image_start` on.
            rows: as `calls.Home.carry_out` has them.
            held: threads that the caller holds; else one is held for it.
            keeping: a descriptor of ours that stays open until the rows are worked
                off, even if we are not there any more. If we are gone before it is
                passed on, nothing is done.
        """
        assert self._line is not None
        if self.astray:
            raise BlockingIOError(errno.EBUSY, _UNFINISHED)
        words, own = framed(
            rows,
            (self._far_end, self.workspace.start),
            self._code + stub.BLOCKED_AT,
            self._lent,
            keeping is not None,
        )
        data = b"".join(padded(piece) for piece in placed)
        start = self.image_start + len(data)
        table = range(start, start + words.nbytes)
        calls.to_addresses(words, table.start)
        data += words.tobytes()
        if len(data) > _IMAGE_BYTES - _CONTROL_BYTES:
            raise OSError(errno.E2BIG, f"a call list of {len(data)} bytes")

        def borrow(tid: int) -> None:
            assert self._line is not None
            self._verify()
            write_bytes(self.pid, self.image_start, data)
            thread = Thread(self.threads, tid, self._code)
            try:
                thread.run(table, self._line, keeping)
            except (Interrupted, ProcessLookupError):
                raise
            except BaseException:
                self.astray = True
                raise

        if held:  # and not ours to be let go
            try:
                borrow(held[0])
            except Interrupted:
                raise BlockingIOError(errno.EBUSY, _STEADY) from None
        else:
            for _ in range(_TRIES):
                with contextlib.suppress(Interrupted):
                    self.threads.hold_one(borrow)
                    break
            else:
                raise BlockingIOError(errno.EBUSY, _STEADY)
        if keeping is not None:
            self._drain()
        done = self._read(table.start, words.nbytes)
        results = np.frombuffer(done, np.int64).reshape(-1, 10)[:, calls.RESULT]
        rows[:, calls.RESULT] = results[own.start : own.stop]

    @property
    def image_start(self) -> int:
        """Where in the process that lies to which rows point."""
        return self.workspace.start + _CONTROL_BYTES
