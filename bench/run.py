"""Measuring rows, one process after another."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NoReturn

import msgspec

from bench import ksmd
from bench.results import Options, Row
from bench.rows import ROWS

_LONGEST_SECONDS = 600.0  # for a row


def measure(name: str, options: Options) -> Row:
    """Measure the row called `name` in a new process."""
    command = [sys.executable, "-m", "bench.child", name]
    # Not in our terminal's group: Ctrl-C is ours, and we tell the child to unwind.
    # Its temporary files are ours too, in case it is killed.
    with (
        tempfile.TemporaryDirectory(prefix="sksm-bench-") as temporary,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": temporary},
            start_new_session=True,
        ) as process,
    ):
        try:
            output, _ = process.communicate(
                msgspec.json.encode(options), timeout=_LONGEST_SECONDS
            )
        except BaseException as error:
            _end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            output = b""
    ksmd.repair()
    if process.returncode or not output:
        row = Row(failed=f"the measuring process ended with {process.returncode}")
    else:
        row = msgspec.json.decode(output.splitlines()[-1], type=Row)
    row.name, row.title = name, ROWS[name]
    return row


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Make SIGTERM unwind what runs in the block, as Ctrl-C does."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have the child undo what it did, and wait for that."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    ksmd.repair()
