"""Every system call of a client, met on its way to the kernel.

The wrappers of `sksm.linux`, the rows of a call list (worked off in Python, which
is their reference) and what the standard library does for us: each asks a hook
first, which may count, fail the call, or stop the process.
"""

import errno
import fcntl
import io
import os
import socket

from sksm.daemon import launch
from sksm.linux import calls, libc

# What each call can fail with here, at its worst moment.
PLAUSIBLE = {
    "open": [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES],
    "read": [errno.ENOMEM, errno.ESRCH, errno.EIO],
    "preadv": [errno.ENOMEM, errno.EIO],
    "listdir": [errno.EMFILE, errno.ENOMEM],
    "ioctl": [errno.ENOMEM, errno.EAGAIN, errno.ENOENT, errno.EINVAL, errno.ENOTTY],
    "flock": [errno.ENOLCK, errno.ENOMEM],
    "mmap": [errno.ENOMEM, errno.EPERM, errno.EACCES],
    "munmap": [errno.ENOMEM],
    "mremap": [errno.ENOMEM, errno.EFAULT, errno.EAGAIN],
    "mprotect": [errno.ENOMEM, errno.EACCES],
    "madvise": [errno.ENOMEM, errno.EAGAIN, errno.EINVAL],
    "process_vm_readv": [errno.EPERM, errno.ENOMEM, errno.EFAULT, errno.ESRCH],
    "userfaultfd": [
        errno.EMFILE,
        errno.ENFILE,
        errno.EPERM,
        errno.ENOSYS,
        errno.ENOMEM,
    ],
    "socket": [errno.EMFILE, errno.ENFILE, errno.ENOBUFS],
    "connect": [errno.EACCES, errno.EAGAIN, errno.ECONNREFUSED],
    "send": [errno.EPIPE, errno.ENOBUFS, errno.ECONNRESET],
    "recvmsg": [errno.ECONNRESET, errno.ENOMEM, errno.EAGAIN],
}

_BY_NUMBER = {libc.SYS[name]: name for name in PLAUSIBLE if name in libc.SYS}


class Seam:
    """The place between a client and the kernel. `hook(name)` gives an errno or None.

    Calls of threads of the test's own pass through it, too: have none that call.
    """

    def __init__(self, patch):
        self.hook = lambda name: None
        for name in ("madvise", "mprotect", "munmap", "mmap", "mremap"):
            self._wrap(patch, libc, name)
        self._wrap(patch, libc, "process_vm_readv")
        self._wrap(patch, libc, "syscall", "userfaultfd")
        for name in ("open", "read", "preadv", "listdir"):
            self._wrap(patch, os, name)
        self._wrap(patch, io, "open")
        for name in ("ioctl", "flock"):
            self._wrap(patch, fcntl, name)
        patch.setattr(calls, "execute", calls.execute_slowly)
        patch.setattr(calls, "invoke", self._row(calls.invoke))
        patch.setattr(launch, "_new_socket", self._socket)

    def _wrap(self, patch, module, attribute, name=None):
        inner = getattr(module, attribute)

        def call(*args, **kwargs):
            if code := self.hook(name or attribute):
                raise OSError(code, os.strerror(code))
            return inner(*args, **kwargs)

        call.__name__ = attribute
        patch.setattr(module, attribute, call)

    def _row(self, inner):
        def invoke(function, *args):
            name = _BY_NUMBER.get(function)
            if name and (code := self.hook(name)):
                return -code
            return inner(function, *args)

        return invoke

    def _socket(self):
        seam = self

        class Watched(socket.socket):
            def connect(self, *args):
                return seam.around("connect", super().connect, *args)

            def send(self, *args):
                return seam.around("send", super().send, *args)

            def recvmsg(self, *args):
                return seam.around("recvmsg", super().recvmsg, *args)

        return seam.around("socket", Watched, socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def around(self, name, inner, *args):
        if code := self.hook(name):
            raise OSError(code, os.strerror(code))
        return inner(*args)


WAYS = max(map(len, PLAUSIBLE.values()))


class Counter:
    """A hook that counts the calls."""

    def __init__(self):
        self.count = 0

    def __call__(self, name):
        self.count += 1


class Fault:
    """A hook that fails the call of that number, and perhaps all like it since.

    `way` counts the plausible ways; `name` and `code` say what failed, and how.
    """

    def __init__(self, number, way, *, for_ever):
        self._left, self._way, self._for_ever = number, way, for_ever
        self.name, self.code = None, 0

    def __call__(self, name):
        if self.name is not None:
            return self.code if self._for_ever and name == self.name else None
        self._left -= 1
        if self._left >= 0 or self._way >= len(PLAUSIBLE[name]):
            return None
        self.name, self.code = name, PLAUSIBLE[name][self._way]
        return self.code

    def __str__(self):
        often = "for ever" if self._for_ever else "once"
        return f"{self.name} failing with {errno.errorcode[self.code]} {often}"
