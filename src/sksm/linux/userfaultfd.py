"""userfaultfd, as far as write protection goes: include/uapi/linux/userfaultfd.h.

Behaviour: Documentation/admin-guide/mm/userfaultfd.rst.
"""

from __future__ import annotations

import fcntl
import os
from ctypes import Structure, c_int64, c_uint64
from errno import EPERM
from typing import TYPE_CHECKING

import numpy as np

from sksm.linux import libc
from sksm.linux.ioctl import IOR, IOWR

if TYPE_CHECKING:
    from sksm.spans import Span

UFFD_API = 0xAA
DEVICE = "/dev/userfaultfd"  # since 6.1
USERFAULTFD_IOC_NEW = UFFD_API << 8  # _IO(0xAA, 0), on the device
UFFD_USER_MODE_ONLY = 1  # faults of system calls fail with EFAULT; since 5.11
UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
UFFD_FEATURE_WP_ASYNC = 1 << 15  # writers do not wait, and are noted; since 6.7
UFFDIO_REGISTER_MODE_WP = 1 << 1
UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0


class uffdio_api(Structure):
    _fields_ = (("api", c_uint64), ("features", c_uint64), ("ioctls", c_uint64))


class uffdio_range(Structure):
    _fields_ = (("start", c_uint64), ("len", c_uint64))


class uffdio_register(Structure):
    _fields_ = (("range", uffdio_range), ("mode", c_uint64), ("ioctls", c_uint64))


class uffdio_copy(Structure):
    _fields_ = (
        ("dst", c_uint64),
        ("src", c_uint64),
        ("len", c_uint64),
        ("mode", c_uint64),
        ("copy", c_int64),  # out: bytes copied, or -errno
    )


class uffdio_writeprotect(Structure):
    _fields_ = (("range", uffdio_range), ("mode", c_uint64))


# struct uffdio_writeprotect. Call lists name many of these by address, so it is a
# dtype; its first two fields are the struct uffdio_range that UFFDIO_WAKE takes.
WRITEPROTECT = np.dtype([("start", "<u8"), ("len", "<u8"), ("mode", "<u8")])

UFFDIO_API = IOWR(UFFD_API, 0x3F, uffdio_api)
UFFDIO_REGISTER = IOWR(UFFD_API, 0x00, uffdio_register)
UFFDIO_UNREGISTER = IOR(UFFD_API, 0x01, uffdio_range)
UFFDIO_WAKE = IOR(UFFD_API, 0x02, uffdio_range)
UFFDIO_COPY = IOWR(UFFD_API, 0x03, uffdio_copy)
UFFDIO_WRITEPROTECT = IOWR(UFFD_API, 0x06, uffdio_writeprotect)


def create() -> int:
    """Open a userfaultfd for this process that can write-protect.

    Without CAP_SYS_PTRACE (and `vm.unprivileged_userfaultfd=0`, the default) it
    is one for faults from user mode only.

    Raises:
        OSError: EPERM where a seccomp filter forbids it (stock Docker), ENOSYS
            without CONFIG_USERFAULTFD, EINVAL without write protection.
    """
    number = libc.SYS["userfaultfd"]
    try:
        fd = libc.syscall(number, os.O_CLOEXEC, 0)
    except OSError as error:
        if error.errno != EPERM:
            raise
        fd = libc.syscall(number, os.O_CLOEXEC | UFFD_USER_MODE_ONLY, 0)
    try:
        enable(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def enable(fd: int, features: int = 0) -> None:
    """Agree with the kernel on the API, with write protection and `features`.

    Raises:
        OSError: EINVAL for features that it has not.
    """
    wanted = features | UFFD_FEATURE_PAGEFAULT_FLAG_WP
    fcntl.ioctl(fd, UFFDIO_API, uffdio_api(api=UFFD_API, features=wanted))


def write_protect(fd: int, span: Span, *, on: bool) -> None:
    """Make writers to `span` wait, or wait no longer.

    Raises:
        OSError: ENOENT where part of `span` is not registered (any more).
    """
    mode = UFFDIO_WRITEPROTECT_MODE_WP if on else 0
    arg = uffdio_writeprotect(range=uffdio_range(span.start, span.size), mode=mode)
    fcntl.ioctl(fd, UFFDIO_WRITEPROTECT, arg)


def wake(fd: int, span: Span) -> None:
    """Have those look again who wait to write to `span`."""
    fcntl.ioctl(fd, UFFDIO_WAKE, uffdio_range(span.start, span.size))


def register(fd: int, span: Span) -> None:
    """Make the pages of `span` ones that `fd` can write-protect.

    Raises:
        OSError: EINVAL for a hole, or memory that cannot be protected (private
            file mappings other than shmem); EBUSY if another userfaultfd has it.
    """
    arg = uffdio_register(
        range=uffdio_range(span.start, span.size), mode=UFFDIO_REGISTER_MODE_WP
    )
    fcntl.ioctl(fd, UFFDIO_REGISTER, arg)


def unregister(fd: int, span: Span) -> None:
    """End what `register` began, waking whoever waits.

    Raises:
        OSError: EINVAL where `span` holds mappings that cannot be registered.
    """
    fcntl.ioctl(fd, UFFDIO_UNREGISTER, uffdio_range(span.start, span.size))
