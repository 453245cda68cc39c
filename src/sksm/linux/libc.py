"""The libc calls that the standard library does not offer on raw addresses.

Every function here raises `OSError` on failure: `errcheck` sees to it once, so
no caller looks at errno. Constants are those of asm-generic/mman-common.h,
linux/mman.h and linux/prctl.h, for what the `mmap` module leaves out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from ctypes import c_int, c_long, c_size_t, c_ulong, c_void_p
from typing import Any

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
MAP_NORESERVE = 0x4000
MAP_FIXED_NOREPLACE = 0x100000  # since 4.17
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MADV_DONTNEED, MADV_MERGEABLE, MADV_UNMERGEABLE = 4, 12, 13
MADV_DONTFORK, MADV_DOFORK = 10, 11
MADV_NOHUGEPAGE = 15
MADV_DONTDUMP, MADV_DODUMP = 16, 17
MADV_WIPEONFORK, MADV_KEEPONFORK = 18, 19
MADV_POPULATE_READ = 22  # since 5.14
PROT_GROWSDOWN = 0x01000000
MS_INVALIDATE = 2
MADV_MERGE = 26  # proposed in 2025; EINVAL on stock kernels
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_SET_MEMORY_MERGE, PR_GET_MEMORY_MERGE = 67, 68  # since 6.4
PR_SET_PTRACER = 0x59616D61

# Numbers of the generic table (arm64) and of x86-64 differ; libc hides them for
# all calls but these.
SYS = {
    "x86_64": {"close": 3, "mmap": 9, "mprotect": 10, "munmap": 11,
               "rt_sigprocmask": 14, "ioctl": 16, "mremap": 25, "msync": 26,
               "madvise": 28, "getpid": 39, "sendto": 44, "recvfrom": 45,
               "recvmsg": 47, "socketpair": 53, "process_vm_readv": 310,
               "seccomp": 317, "userfaultfd": 323, "pidfd_getfd": 438,
               "process_madvise": 440},
    "aarch64": {"close": 57, "mmap": 222, "mprotect": 226, "munmap": 215,
                "rt_sigprocmask": 135, "ioctl": 29, "mremap": 216, "msync": 227,
                "madvise": 233, "getpid": 172, "sendto": 206, "recvfrom": 207,
                "recvmsg": 212, "socketpair": 199, "process_vm_readv": 270,
                "seccomp": 277, "userfaultfd": 282, "pidfd_getfd": 438,
                "process_madvise": 440},
}[os.uname().machine]  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


class iovec(ctypes.Structure):
    """One piece of a scattered read or write (bits/types/struct_iovec.h)."""

    _fields_ = (("iov_base", c_void_p), ("iov_len", c_size_t))


def raise_on_failure(result: Any, function: Any, args: Any) -> Any:
    """Raise `OSError` for a result that says to look at errno (an `errcheck`)."""
    if result in (-1, 2**64 - 1):
        code = ctypes.get_errno()
        raise OSError(code, f"{function.__name__}: {os.strerror(code)}")
    return result


def _declare(name: str, *argtypes: type, restype: type = c_int) -> Callable[..., int]:
    function = _libc[name]
    function.argtypes = argtypes
    function.restype = restype
    function.errcheck = raise_on_failure
    return function


def address_of(name: str) -> int:
    """Give the address of a function of libc, for a call list."""
    return ctypes.cast(_libc[name], c_void_p).value or 0


# SAFETY: raw addresses. Callers are `sksm.linux` and `sksm.process` only.
madvise = _declare("madvise", c_void_p, c_size_t, c_int)
mprotect = _declare("mprotect", c_void_p, c_size_t, c_int)
munmap = _declare("munmap", c_void_p, c_size_t)
msync = _declare("msync", c_void_p, c_size_t, c_int)
mmap = _declare(
    "mmap", c_void_p, c_size_t, c_int, c_int, c_int, c_long, restype=c_size_t
)
mremap = _declare(
    "mremap", c_void_p, c_size_t, c_size_t, c_int, c_void_p, restype=c_size_t
)
process_vm_readv = _declare(
    "process_vm_readv",
    *(c_int, c_void_p, c_ulong, c_void_p, c_ulong, c_ulong),
    restype=c_long,
)
process_vm_writev = _declare(
    "process_vm_writev",
    *(c_int, c_void_p, c_ulong, c_void_p, c_ulong, c_ulong),
    restype=c_long,
)
fallocate = _declare("fallocate", c_int, c_int, c_long, c_long)
prctl = _declare("prctl", c_int, c_ulong, c_ulong, c_ulong, c_ulong)
syscall = _declare("syscall", c_long, c_long, c_long, restype=c_long)


def trim() -> None:
    """Give back to the kernel what malloc keeps for later: malloc_trim(3), glibc's."""
    with contextlib.suppress(AttributeError):  # another libc
        _libc.malloc_trim(0)


memcmp = _libc["memcmp"]
memcmp.argtypes, memcmp.restype = (c_void_p, c_void_p, c_size_t), c_int

# The one that does not raise: `sksm.linux.calls` keeps results, failures too.
raw_syscall = _libc["syscall"]
raw_syscall.restype = c_long
