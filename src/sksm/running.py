"""Becoming a program that may call MADV_MERGE."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from sksm.daemon.client import RemoteStore
from sksm.errors import NotPermitted, Unsupported
from sksm.linux import libc, notify
from sksm.linux.features import Feature, missing
from sksm.linux.trials import page

CANNOT_EXECUTE, NOT_FOUND = 126, 127  # as shells have them


def execute(command: Sequence[str]) -> NoReturn:
    """Become a program, or end as shells do where that cannot be."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        print(f"sksm: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        os._exit(NOT_FOUND if missing else CANNOT_EXECUTE)


def answered() -> bool:
    """Say whether MADV_MERGE is answered here already: by the kernel, or another us."""
    with page() as span, contextlib.suppress(OSError):
        # SAFETY: an advice that keeps contents, on a page of our own.
        libc.madvise(span.start, span.size, libc.MADV_MERGE)
        return True
    return False


def let_merge() -> None:
    """Have MADV_MERGE answered, for this process and for all that comes of it.

    The filter cannot be taken away again. A child of the daemon's answers, until
    nobody is left under the filter.

    Raises:
        Unsupported: the kernel does not let anybody listen.
        NotPermitted: nobody may stop this process to merge its memory.
        DaemonUnreachable: there is no daemon to be had.
    """
    with contextlib.closing(RemoteStore()) as daemon:
        listener = listen()
        try:
            daemon.supervise(listener)
        finally:
            os.close(listener)


def listen() -> int:
    """Have calls of MADV_MERGE wait for who has the listener that this gives.

    For this thread and all that comes of it, from now on.

    Raises:
        Unsupported, NotPermitted: the kernel does not let anybody listen.
    """
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    try:
        return notify.listen()
    except OSError as error:
        raise _no_listening(error) from error


def limits() -> list[str]:
    """Say for what MADV_MERGE has no effect here."""
    if refusal := missing(Feature.MEMFD_EXEC):
        return [f"executable memory cannot merge: {refusal}"]
    return []


def _no_listening(error: OSError) -> Unsupported | NotPermitted:
    if error.errno == errno.EBUSY:
        return Unsupported(
            "a supervisor of system calls is here already, and not one of ours: "
            "the kernel allows one (seccomp(2), SECCOMP_FILTER_FLAG_NEW_LISTENER)"
        )
    kind = NotPermitted if error.errno in (errno.EPERM, errno.EACCES) else Unsupported
    return kind(f"no listening to system calls: {error.strerror} (seccomp, Linux 5.0)")
