"""A userfaultfd of another process, in its hands and in ours."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from sksm.linux import pagemap, userfaultfd
from sksm.process import BUSY
from sksm.process.borrowing import Thread
from sksm.process.foothold import Foothold
from sksm.spans import Span


class WriteWatch:
    """Notes which pages of a process are written to, at 0.7 us for each.

    The process is not stopped for it, and needs the foothold only to begin with.

    Args:
        foothold: in which process.
        pagemap: an open /proc/PID/pagemap; ours is a copy of it.

    Raises:
        OSError: EINVAL before Linux 6.7; as `open_there`.
    """

    def __init__(self, foothold: Foothold, pagemap_fd: int) -> None:
        feature = userfaultfd.UFFD_FEATURE_WP_ASYNC
        self._ours, _ = open_there(foothold, feature)
        self._pagemap = os.dup(pagemap_fd)

    def add(self, span: Span) -> bool:
        """Watch `span` from now on, a mapping; all of it counts as written to.

        False for memory that cannot be watched so (a file's private mapping), or that
        somebody else watches, or that is gone. Where it is watched, nothing happens.
        """
        try:
            userfaultfd.register(self._ours, span)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBUSY, errno.ENOMEM):
                raise
            return False
        return True

    def renew(self, span: Span) -> None:
        """Forget what was written to in `span`, which is watched."""
        pagemap.write_protect(self._pagemap, span)

    def leave(self, span: Span) -> None:
        """Watch `span` no longer, all of it or part of what is watched."""
        with contextlib.suppress(OSError):  # gone, or replaced
            userfaultfd.unregister(self._ours, span)

    def written(self, spans: Iterable[Span]) -> list[Span]:
        """List the runs of pages that were written to so far, ascending."""
        return [run for span in spans for run in pagemap.written(self._pagemap, span)]

    def take_written(self, span: Span) -> npt.NDArray[np.void]:
        """List what was written to since the last time: see `pagemap.take_written`."""
        return pagemap.take_written(self._pagemap, span)

    def end(self) -> None:
        """Watch no longer."""
        os.close(self._ours)
        os.close(self._pagemap)


class Barrier:
    """Holds writers to a process's memory off, while we live.

    The descriptor is ours alone: with us it goes, and the kernel ends what it did.

    Args:
        foothold: in which process.

    Raises:
        OSError: as `open_there`.
    """

    def __init__(self, foothold: Foothold) -> None:
        self.fd, self.whole = open_there(foothold, 0)

    def raise_at(self, span: Span) -> None:
        """Make who writes to `span` wait, from now on.

        Raises:
            BlockingIOError: it was left standing for a list that was given up.
        """
        if self.fd < 0:
            raise BlockingIOError(errno.EBUSY, BUSY)
        userfaultfd.write_protect(self.fd, span, on=True)

    def leave_standing(self) -> None:
        """Let go of the barrier, which stands for as long as a call list needs it.

        A thread that we could not take back may work off its list still: it exchanges
        pages that were compared, and nobody must write to them before that. Its end of
        the line holds the descriptor until then (`Thread.run`).
        """
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def lower_at(self, span: Span) -> None:
        """Let everybody write to `span`, or what has been put in its place."""
        if self.fd < 0:
            return
        try:
            userfaultfd.write_protect(self.fd, span, on=False)  # wakes them, too
        except OSError:  # replaced: nothing is left to release
            with contextlib.suppress(OSError):
                userfaultfd.wake(self.fd, span)

    def end_at(self, span: Span) -> None:
        """Have nothing to do with `span` any more, unless a list needs it still."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):  # what was replaced is not registered
                userfaultfd.unregister(self.fd, span)


FORBIDDEN = "it may not create a userfaultfd (seccomp), so writers cannot be held off"


def open_there(foothold: Foothold, features: int) -> tuple[int, bool]:
    """Create a userfaultfd for a process, for us alone.

    If we may, through /dev/userfaultfd, opened by us: such a one sees the faults of
    system calls, too, whatever the process itself is allowed to create.

    Args:
        foothold: in which process.
        features: `UFFD_FEATURE_*` besides write protection.

    Returns:
        Our descriptor, and whether it sees the faults of system calls. Those would
        fail otherwise, with EFAULT.

    Raises:
        OSError: EOPNOTSUPP if it cannot be had.
    """
    device = _device()
    try:
        ours, whole = foothold.have(lambda thread: _opened(foothold, thread, device))
    finally:
        if device is not None:
            os.close(device)
    userfaultfd.enable(ours, features)
    return ours, whole


def _device() -> int | None:
    with contextlib.suppress(OSError):
        return os.open(userfaultfd.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    return None


def _opened(foothold: Foothold, thread: Thread, device: int | None) -> tuple[int, bool]:
    """Have a thread open one, as good as can be, and give it to us."""
    if device is not None:
        lent = foothold.receive(thread, device)
        new = (lent, userfaultfd.USERFAULTFD_IOC_NEW, os.O_CLOEXEC)
        there = _tried(thread, "ioctl", *new)
        foothold.give_back(thread, lent)
        if there is not None:
            return foothold.take(thread, there), True
    for whole, mode in ((True, 0), (False, userfaultfd.UFFD_USER_MODE_ONLY)):
        there = _tried(thread, "userfaultfd", os.O_CLOEXEC | mode)
        if there is not None:
            return foothold.take(thread, there), whole
    raise OSError(errno.EOPNOTSUPP, FORBIDDEN)


def _tried(thread: Thread, name: str, *args: int) -> int | None:
    try:
        return thread.call(name, *args)
    except ProcessLookupError:
        raise
    except OSError:
        return None
