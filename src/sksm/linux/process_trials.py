"""The attempts behind `features` that concern other processes.

What would leave something behind (a filter, a tracer) is tried in a child.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
from collections.abc import Callable
from ctypes import c_long, c_uint32
from pathlib import Path

from sksm.linux import libc, notify, seccomp
from sksm.linux.trials import page
from sksm.spans import Span

_NR = {
    "x86_64": {"ptrace": 101, "seccomp": 317, "pidfd_getfd": 438},
    "aarch64": {"ptrace": 117, "seccomp": 277, "pidfd_getfd": 438},
}[os.uname().machine]
_PTRACE_SEIZE = 0x4206  # linux/ptrace.h
_PR_SET_PTRACER_ANY = 2**64 - 1
_SECCOMP_GET_ACTION_AVAIL = 2  # linux/seccomp.h

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_SCOPES = {
    "0": "all your processes",
    "1": "children, and who names its tracer (Yama 1)",
    "2": "with CAP_SYS_PTRACE (Yama 2)",
    "3": "nobody (Yama 3)",
}


def read_another_process() -> str:
    """Read a process that is no descendant of the reader, and names it tracer.

    That is what the daemon does. The reader is a child of the process it reads,
    since Yama lets parents read children in any case.
    """
    _in_child(_be_read)
    return _scope()


def _be_read() -> None:
    with contextlib.suppress(OSError):  # EINVAL without Yama
        libc.prctl(libc.PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
    target = os.getpid()
    with page() as span:
        _in_child(lambda: _read_page(target, span))


def _read_page(pid: int, span: Span) -> None:
    into = ctypes.create_string_buffer(span.size)
    here = libc.iovec(ctypes.addressof(into), span.size)
    there = libc.iovec(span.start, span.size)
    # SAFETY: `into` has room for the page.
    libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)


def seize_child() -> str:
    """Attach to a child as its tracer."""
    near, far = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(far)
        os.read(near, 1)  # until the parent closes its end, or is gone
        os._exit(0)
    try:
        _syscall("ptrace", _PTRACE_SEIZE, pid, 0, 0)
    finally:
        os.close(near)
        os.close(far)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return _scope()


def fetch_descriptor() -> str:
    """Fetch a descriptor by way of a pidfd."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        os.close(_syscall("pidfd_getfd", pidfd, pidfd, 0))
    finally:
        os.close(pidfd)
    return ""


def listen_to_system_calls() -> str:
    """Install a filter that has a listener, in a child."""
    _in_child(_install_filter)
    return ""


def _install_filter() -> None:
    action = c_uint32(seccomp.Action.USER_NOTIF)
    _syscall("seccomp", _SECCOMP_GET_ACTION_AVAIL, 0, ctypes.addressof(action))
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    notify.listen()


def _scope() -> str:
    try:
        return _SCOPES.get(_YAMA.read_text().strip(), "")
    except OSError:
        return _SCOPES["0"]


# -- how to try


def _syscall(name: str, *args: int) -> int:
    words = [ctypes.c_ulong(arg) for arg in args]
    result = int(libc.raw_syscall(c_long(_NR[name]), *words))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def _in_child(action: Callable[[], object]) -> None:
    """Run `action` in a child, and raise here the `OSError` that it met there."""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            action()
            code = 0
        except OSError as error:
            code = error.errno or code
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == -signal.SIGSYS:
        raise OSError(errno.EPERM, "a seccomp filter kills who tries it")
    if status in errno.errorcode:
        raise OSError(status, os.strerror(status))
    if status:
        raise RuntimeError(f"a trial ended with status {status}")
