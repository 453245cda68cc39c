"""Another Python process that is spoken to by pipes, and ends with its input."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def module(name: str, *args: int) -> Iterator[subprocess.Popen[str]]:
    """Run a module; it is to end when its input does, and is killed if it does not."""
    command = [sys.executable, "-m", name, *map(str, args)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
