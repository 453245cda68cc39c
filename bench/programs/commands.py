"""The operator's commands, run as an operator runs them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from bench.results import Wrong

_PATIENCE_SECONDS = 600.0
_NOTHING_MERGED = 3  # exit code: not supported here, or nothing could be merged


class Done(msgspec.Struct, frozen=True):
    """How a command ended."""

    exit_code: int
    seconds: float  # from its start to its end, interpreter included
    said: str  # on stderr
    output: dict[str, Any]  # its JSON object; empty if it printed none

    @property
    def merged_nothing(self) -> bool:
        """Whether it says that nothing could be merged."""
        return self.exit_code == _NOTHING_MERGED


def run(name: str, pids: Sequence[int], *options: str) -> Done:
    """Run `sksm NAME PID... --json`.

    Raises:
        Wrong: it failed, and not because nothing could be merged.
    """
    command = [sys.executable, "-m", "sksm.commands.main", name]
    command += [*map(str, pids), "--json", *options]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise Wrong(f"sksm {name}: not done in {_PATIENCE_SECONDS:.0f} s") from error
    seconds = time.perf_counter() - start
    if done.returncode not in (0, _NOTHING_MERGED):
        said = done.stderr.strip()[-500:]
        raise Wrong(f"sksm {name} ended with {done.returncode}: {said}")
    output = msgspec.json.decode(done.stdout) if done.stdout.strip() else {}
    return Done(done.returncode, seconds, done.stderr.strip(), output)
