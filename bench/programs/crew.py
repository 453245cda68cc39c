"""What the bench knows of a crew: its processes, and what to ask them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.results import Wrong

# Asks one question and checks the answer. Raises `Wrong`.
Client = Callable[[], None]

PATIENCE_SECONDS = 120.0  # for a program to be ready, on a busy machine
_END_SECONDS = 20.0


@dataclasses.dataclass
class Crew:
    """Programs that run and are ready."""

    pids: list[int]  # those that an operator would name
    clients: list[Client]  # for one thread each
    # Ask for everything that they hold. It may write to much of their memory.
    inspect: Client
    kin: list[int] = dataclasses.field(default_factory=list)  # share memory with them
    busy: bool = True  # whether the clients ask while a merge is measured
    # A program beside the clients that makes work, again and again.
    extra: Client | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def family(self) -> list[int]:
        """Every process whose memory the merge can change."""
        return self.pids + self.kin

    def require_alive(self) -> None:
        """Make sure that all of them still run.

        Raises:
            Wrong: one has ended.
        """
        for pid in self.family:
            if not _runs(pid):
                raise Wrong(f"process {pid} has ended{_how(pid)}")


@contextlib.contextmanager
def running(command: Sequence[str | Path], **popen: Any) -> Iterator[subprocess.Popen]:
    """Run a program for the block.

    It ends when we are killed, too. Not in our terminal's group: Ctrl-C is ours.
    """
    bound = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    with subprocess.Popen(bound, process_group=0, **popen) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def ordinary_user() -> dict[str, Any]:
    """Give what makes `Popen` run a program as nobody, if we are root."""
    if os.geteuid() != 0:
        return {}
    return {"user": "nobody", "group": "nogroup", "extra_groups": []}


def wait_for(ready: Callable[[], Any], what: str) -> Any:
    """Wait until `ready()` is true, or raises no `OSError` any more; give its value.

    Raises:
        Wrong: it took too long.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if value := ready():
                return value
        time.sleep(0.02)
    raise Wrong(f"{what}: not ready after {PATIENCE_SECONDS:.0f} s")


def expect(answer: object, wanted: object, question: str) -> None:
    """Hold an answer against what it must be.

    Raises:
        Wrong: it is another.
    """
    if answer != wanted:
        raise Wrong(f"{question}: {answer!r:.200}, not {wanted!r:.200}")


def _how(pid: int) -> str:
    """Say by which signal a process ended that nobody has reaped (proc_pid_stat(5))."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/stat").read_text()
        number = os.WTERMSIG(int(text[text.rindex(")") + 2 :].split()[49]))
        return f": {signal.Signals(number).name}" if number else " by itself"
    return ""


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
