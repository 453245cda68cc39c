"""System calls that wait for another process's answer: seccomp(2), user notification.

Declared from include/uapi/linux/seccomp.h; Documentation/userspace-api/
seccomp_filter.rst tells how it works. The filter here fires for MADV_MERGE and for
nothing else, so that nothing else pays.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
from ctypes import c_int32, c_int64, c_uint32, c_uint64

import numpy as np

from sksm.linux import libc
from sksm.linux.ioctl import IOW, IOWR
from sksm.linux.seccomp import (
    AUDIT_ARCH,
    BPF_ABS,
    BPF_JEQ,
    INSTRUCTION,
    Action,
    Class,
    Filter,
    seccomp_data,
)

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3


class seccomp_notif(ctypes.Structure):
    _fields_ = (
        *(("id", c_uint64), ("pid", c_uint32), ("flags", c_uint32)),
        ("data", seccomp_data),
    )


class seccomp_notif_resp(ctypes.Structure):
    _fields_ = (
        *(("id", c_uint64), ("val", c_int64), ("error", c_int32)),
        ("flags", c_uint32),
    )


SECCOMP_IOCTL_NOTIF_RECV = IOWR(ord("!"), 0, seccomp_notif)
SECCOMP_IOCTL_NOTIF_SEND = IOWR(ord("!"), 1, seccomp_notif_resp)
SECCOMP_IOCTL_NOTIF_ID_VALID = IOW(ord("!"), 2, c_uint64)

_ARCH, _ARGS = seccomp_data.arch.offset, seccomp_data.args.offset
_LOAD = Class.LD | BPF_ABS
_EQUAL = Class.JMP | BPF_JEQ


@dataclasses.dataclass(frozen=True, slots=True)
class Notification:
    """A system call that waits for an answer."""

    id: int
    tid: int  # who calls, as our pid namespace numbers it
    number: int  # of the system call
    args: tuple[int, ...]


def merge_filter() -> Filter:
    """Give the program that stops `madvise` and `process_madvise` with MADV_MERGE.

    The advice is an int: the kernel looks at the lower half of its register, and so
    does this.
    """
    program = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 0, 7, AUDIT_ARCH),
        (_LOAD, 0, 0, 0),
        (_EQUAL, 1, 0, libc.SYS["madvise"]),
        (_EQUAL, 2, 4, libc.SYS["process_madvise"]),
        (_LOAD, 0, 0, _ARGS + 2 * 8),
        (_EQUAL, 3, 2, libc.MADV_MERGE),
        (_LOAD, 0, 0, _ARGS + 3 * 8),
        (_EQUAL, 1, 0, libc.MADV_MERGE),
        (Class.RET, 0, 0, Action.ALLOW),
        (Class.RET, 0, 0, Action.USER_NOTIF),
    ]
    return np.array(program, INSTRUCTION)


def listen() -> int:
    """Put the filter on this thread, and on all that comes of it; give its listener.

    Raises:
        OSError: EBUSY if a filter of ours has a listener already; EACCES without
            `no_new_privs`; EINVAL before Linux 5.0.
    """
    filter_ = merge_filter()
    program = _sock_fprog(len(filter_), filter_.ctypes.data)
    # SAFETY: the kernel copies the program, which lives as long as the call.
    return libc.syscall(
        libc.SYS["seccomp"],
        SECCOMP_SET_MODE_FILTER,
        SECCOMP_FILTER_FLAG_NEW_LISTENER,
        ctypes.c_void_p(ctypes.addressof(program)),
    )


class _sock_fprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.c_void_p))


def is_listener(fd: int) -> bool:
    """Say whether a descriptor is what `listen` gives."""
    try:
        fcntl.ioctl(fd, SECCOMP_IOCTL_NOTIF_ID_VALID, c_uint64(0))
    except OSError as error:
        return error.errno == errno.ENOENT  # there is no call of that number
    return True


def receive(listener: int) -> Notification | None:
    """Take the next call that waits; None if it went away meanwhile.

    Blocks unless poll(2) said that there is one.
    """
    found = seccomp_notif()
    try:
        fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, found)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINTR):
            raise
        return None
    return Notification(found.id, found.pid, found.data.nr, tuple(found.data.args))


def answer(listener: int, notification: Notification, result: int) -> bool:
    """Have a call return: a result, or -errno. False if it waits no longer."""
    value, error = (result, 0) if result >= 0 else (0, result)
    reply = seccomp_notif_resp(notification.id, value, error, 0)
    try:
        fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, reply)
    except OSError as failure:
        if failure.errno != errno.ENOENT:
            raise
        return False
    return True


def waits(listener: int, notification: Notification) -> bool:
    """Say whether a call still waits: if not, its thread's number may be another's."""
    try:
        fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, c_uint64(notification.id))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True
