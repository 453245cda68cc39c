"""The workers of the demo, seen from outside: started, asked, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sksm
from sksm.errors import SksmError

_PATIENCE_SECONDS = 60.0  # for one answer


class Hand:
    """One worker process."""

    def __init__(self, path: Path, private_bytes: int, seed: int) -> None:
        module = "sksm.commands.demonstration.worker"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, path, str(private_bytes), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            text=True,
            process_group=0,  # Ctrl-C is for us, who then end it
        )

    @property
    def pid(self) -> int:
        """The process."""
        return self.process.pid

    def tell(self, *words: object) -> None:
        """Send a command."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` will say why
            self.process.stdin.write(" ".join(map(str, words)) + "\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer.

        Raises:
            SksmError: it met an error, or its end.
        """
        stdout = self.process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], _PATIENCE_SECONDS)[0]:
            raise SksmError(f"worker {self.pid} gave no answer")
        line = stdout.readline()
        if not line:
            raise SksmError(f"worker {self.pid} ended: exit code {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise SksmError(f"worker {self.pid}: {found['error']}")
        return found

    def ask(self, *words: object) -> dict[str, Any]:
        """Send a command and wait for the answer."""
        self.tell(*words)
        return self.answer()

    def end(self) -> None:
        """End it, if it has not ended, and wait for that."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@contextlib.contextmanager
def crew(count: int, path: Path, private_bytes: int) -> Iterator[list[Hand]]:
    """Have some workers, each started by itself; they end with the block."""
    with contextlib.ExitStack() as undo:  # a signal in one step spares no other
        hands = []
        for seed in range(count):
            hands.append(Hand(path, private_bytes, seed))
            undo.callback(hands[-1].end)
        yield hands


def ask_all(hands: list[Hand], *words: object) -> list[dict[str, Any]]:
    """Have all workers do something at the same time."""
    for hand in hands:
        hand.tell(*words)
    return [hand.answer() for hand in hands]


def _environment() -> dict[str, str]:
    """Make the package importable there as it is here; keep numpy to one thread."""
    root = str(Path(sksm.__file__).parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, inherited] if inherited else [root])
    return {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
