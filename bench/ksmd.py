"""ksmd, the kernel's own merging thread, with every brake off; for root only."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench import memory
from bench.memory import Words
from bench.results import Wrong
from sksm.daemon import runtime
from sksm.linux import ksm

# Of this user, not of a daemon of the benchmark's own: ksmd is the machine's, and
# so are the knobs that the next one finds here if this process is killed.
_STATE = runtime.directory() / ksm.STATE_NAME
_PATIENCE_SECONDS = 120.0
_ENOUGH = 0.999  # of the pages; the last few may take another full scan


class Work(NamedTuple):
    """What ksmd needed for merging two equal buffers."""

    seconds: float
    cpu_seconds: float


@contextlib.contextmanager
def borrowed() -> Iterator[str | None]:
    """Have ksmd for the block, stopped; gives the reason if it cannot be had."""
    with contextlib.ExitStack() as stack:
        reason = None
        try:
            stack.enter_context(ksm.borrowed(_STATE))
        except OSError as error:
            reason = error.strerror or str(error)
        yield reason


def repair() -> None:
    """Give the knobs back if whoever borrowed them was killed."""
    with contextlib.suppress(OSError):  # not ours to turn, so nobody turned them
        ksm.repair(_STATE)


def merge(contents: Words) -> Work:
    """Give ksmd two buffers with these contents, and wait until they are one.

    Call it inside `borrowed`.

    Raises:
        Wrong: it was not done in two minutes, or was disturbed.
    """
    me, before = os.getpid(), ksm.figures()
    wanted = ksm.merged_pages(me) + 2 * int(memory.pages(contents) * _ENOUGH)
    buffers = [memory.buffer(contents.nbytes) for _ in range(2)]
    for one in buffers:
        one[:] = contents
        memory.advise(one, mmap.MADV_MERGEABLE)
    del one
    started, used = time.perf_counter(), ksm.cpu_seconds() or 0.0
    ksm.open_wide()
    ksm.tune("run", "1")
    try:
        _wait_for("merged pages", lambda: ksm.merged_pages(me) >= wanted)
        seconds = time.perf_counter() - started
        work = Work(seconds, (ksm.cpu_seconds() or 0.0) - used)
        if not ksm.is_wide_open():
            raise Wrong("somebody else turned the knobs of ksmd meanwhile")
        buffers.clear()  # ksmd, while it runs, clears up behind memory that is gone
        gone = before["pages_shared"]
        _wait_for("pages_shared", lambda: ksm.figures()["pages_shared"] <= gone)
    finally:
        ksm.tune("run", "0")
    return work


def _wait_for(what: str, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not reached():
        if time.monotonic() > deadline:
            raise Wrong(f"ksmd: {what} not reached after {_PATIENCE_SECONDS:.0f} s")
        time.sleep(0.002)
