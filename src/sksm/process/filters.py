"""Whether a process may make the system calls that we have it make.

A seccomp filter may kill a process for a system call that its programmers did not
foresee, and ours are such. So they are put to the filters before they are made.
"""

from __future__ import annotations

import errno
import os

from sksm.linux import libc, seccomp, userfaultfd

UNREADABLE = (
    "its seccomp filter might end it for what has to be done, and only root can read "
    "it (CAP_SYS_ADMIN): run this as root"
)
FORBIDDEN = "its seccomp filter would answer {} with {}"
_HARMLESS = (seccomp.Action.ALLOW, seccomp.Action.LOG, seccomp.Action.ERRNO)

_STATUS_BYTES = 8192  # more than it has
_RW = libc.PROT_READ | libc.PROT_WRITE
_ANONYMOUS = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_FIXED_NOREPLACE
_ADVICES = (
    *(libc.MADV_DONTFORK, libc.MADV_DONTNEED, libc.MADV_POPULATE_READ),
    *(libc.MADV_MERGEABLE, libc.MADV_UNMERGEABLE, libc.MADV_MERGE),
    *(libc.MADV_DOFORK, libc.MADV_KEEPONFORK, libc.MADV_WIPEONFORK),
    *(libc.MADV_DODUMP, libc.MADV_DONTDUMP, libc.MADV_NOHUGEPAGE),
)
# What is done in a process, with those arguments that a filter may look at.
_CALLS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("rt_sigprocmask", (2,)),
    ("mmap", (0, 0, _RW, _ANONYMOUS)),
    ("mmap", (0, 0, _RW, libc.MAP_PRIVATE | libc.MAP_FIXED_NOREPLACE)),
    ("mmap", (0, 0, _RW, libc.MAP_PRIVATE | libc.MAP_FIXED)),
    ("socketpair", (1, 5)),
    *((name, ()) for name in ("close", "munmap", "mremap", "process_vm_readv")),
    ("getpid", ()),
    *((name, ()) for name in ("sendto", "recvfrom", "recvmsg", "userfaultfd")),
    ("mprotect", (0, 0, libc.PROT_READ)),
    ("mprotect", (0, 0, libc.PROT_READ | libc.PROT_GROWSDOWN)),
    ("msync", (0, 0, libc.MS_INVALIDATE)),
    *(("madvise", (0, 0, advice)) for advice in _ADVICES),
    ("ioctl", (0, userfaultfd.USERFAULTFD_IOC_NEW)),
)


class Filters:
    """The filters of a process's threads, those that were found harmless.

    Args:
        pid: the process.
        known: how many filters, the oldest, somebody knows to be harmless.
    """

    def __init__(self, pid: int, known: int = 0) -> None:
        self._pid, self._known = pid, known
        self._status: dict[int, int] = {}  # thread -> its open status file
        self._harmless: set[tuple[int, int]] = set()  # thread, number of filters

    def require_harmless(self, tid: int) -> None:
        """Make sure that a held thread survives what it is to do for us.

        Filters can be added, and never taken away, so their number tells whether
        there are new ones.

        Raises:
            OSError: EOPNOTSUPP if it would not, or nobody knows.
        """
        count = self._count(tid)
        if count > self._known and (tid, count) not in self._harmless:
            self._examine(tid)
            self._harmless.add((tid, count))

    def _count(self, tid: int) -> int:
        """Read `Seccomp_filters` (since 5.9), or whether there are any (proc(5))."""
        if tid not in self._status:
            path = f"/proc/{self._pid}/task/{tid}/status"
            self._status[tid] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        text = os.pread(self._status[tid], _STATUS_BYTES, 0)
        for name in (b"\nSeccomp_filters:", b"\nSeccomp:"):
            _, found, rest = text.partition(name)
            if found:
                return int(rest.split(maxsplit=1)[0])
        return 0

    def close(self) -> None:
        """Close what is open."""
        for fd in self._status.values():
            os.close(fd)
        self._status.clear()

    def _examine(self, tid: int) -> None:
        try:
            filters = seccomp.read_filters(tid)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.EIO, errno.EINVAL):
                raise
            raise OSError(errno.EOPNOTSUPP, UNREADABLE) from error
        for name, args in _CALLS:
            action = seccomp.verdict(filters, libc.SYS[name], args)
            if action not in _HARMLESS:
                answer = FORBIDDEN.format(name, action.name)
                raise OSError(errno.EOPNOTSUPP, answer)
