"""A daemon of the benchmark's own, ended with it."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

import sksm
from bench.results import Wrong
from sksm import session
from sksm.daemon.runtime import OVERRIDE
from sksm.spans import PAGE_SIZE


@contextlib.contextmanager
def own() -> Iterator[int]:
    """Run the block with a new daemon, connected already; gives its pid."""
    with tempfile.TemporaryDirectory(prefix="run-") as directory:
        before = os.environ.get(OVERRIDE)
        session.current.close()
        os.environ[OVERRIDE] = directory
        try:
            with _surviving(_start(), Path(directory, "sksmd.log")) as pid:
                yield pid
        finally:
            session.current.close()
            _end()
            if before is None:
                del os.environ[OVERRIDE]
            else:
                os.environ[OVERRIDE] = before


@contextlib.contextmanager
def _surviving(pid: int, log: Path) -> Iterator[int]:
    """Make sure that the daemon lives through the block, and is not another one.

    Raises:
        Wrong: it does not, with the last it said; whatever else went wrong then
            went wrong because of that.
    """
    try:
        yield pid
    finally:
        if sksm.stats().daemon_pid != pid:
            said = log.read_text().splitlines()[-1:] if log.exists() else []
            raise Wrong(f"the daemon ended in the middle: {''.join(said)}")


def _start() -> int:
    """Have the first merge start the daemon: one page of noise."""
    page = sksm.empty(PAGE_SIZE, np.uint8)
    page[:] = np.frombuffer(os.urandom(PAGE_SIZE), np.uint8)
    sksm.merge(page)
    pid = sksm.stats().daemon_pid
    assert pid is not None
    return pid


def _end() -> None:
    pid = sksm.stats().daemon_pid
    if pid is None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.send_signal(signal.SIGTERM)
        process.wait(10)
