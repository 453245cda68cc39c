"""Holding writers to our own memory off while it is compared and replaced."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from sksm.linux import calls, userfaultfd
from sksm.spans import Span

_ABSENT = (errno.EPERM, errno.ENOSYS, errno.EINVAL)  # seccomp, CONFIG, before 5.7
_open: set[int] = set()  # after a fork these mean the parent's memory


@contextlib.contextmanager
def protection(span: Span) -> Iterator[int | None]:
    """Register `span` with a userfaultfd, for a call list to protect parts of it.

    Where the kernel offers no protection (no userfaultfd, as in stock Docker; a
    private file mapping), the caller's word that the memory is invariant is all
    there is, and the comparison follows within microseconds.

    Yields:
        The descriptor; None if there is no protection. Also while there is only one
        thread: another one may be started in the middle of a merge, by C code, too.

    Raises:
        OSError: EBUSY if another userfaultfd watches the memory.
    """
    fd = _create() if calls.uninterrupted() else None
    if fd is None:
        yield None
        return
    try:
        yield fd if _register(fd, span) else None
    finally:
        # Closing unregisters, too, unless a child that was forked holds a copy.
        with contextlib.suppress(OSError):  # what was replaced is not registered
            userfaultfd.unregister(fd, span)
        _open.discard(fd)
        os.close(fd)


def _create() -> int | None:
    try:
        fd = userfaultfd.create()
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        return None
    _open.add(fd)
    return fd


def _register(fd: int, span: Span) -> bool:
    try:
        userfaultfd.register(fd, span)
    except OSError as error:
        if error.errno != errno.EINVAL:  # not memory that can be protected
            raise
        return False
    return True


def _close_inherited() -> None:
    for fd in _open:
        os.close(fd)
    _open.clear()


os.register_at_fork(after_in_child=_close_inherited)
