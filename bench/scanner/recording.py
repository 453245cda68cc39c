"""Memory and processor time while something runs, read again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from bench.results import Wrong
from bench.scanner.scanners import Scanner
from sksm.commands.demonstration import figures

_END_SECONDS = 60.0


class Look(msgspec.Struct, frozen=True):
    """What there is at a moment."""

    seconds: float
    # Anonymous, shared, page tables, slab: of all that runs here, less what there was
    # before anything was started.
    machine_bytes: int
    programs_bytes: int  # PSS of the programs and the scanner, and what else it takes
    cpu_seconds: float  # of the scanner


class Record(msgspec.Struct):
    """All that was seen of one run of a script, or why nothing was."""

    name: str
    looks: list[Look] = []
    marks: list[float] = []  # when steps of the script were done
    epochs: list[dict[str, Any]] = []  # what `sksm watch` said
    skipped: str | None = None
    failed: str | None = None

    @property
    def done(self) -> bool:
        """Whether there is something to report."""
        return not (self.skipped or self.failed)


class Recorder:
    """Looks for as long as the block lasts, at programs that may come later.

    Make it before the scanner and the programs are started: what is in use then does
    not count.
    """

    def __init__(self, every_seconds: float) -> None:
        self.looks: list[Look] = []
        self.pids: Sequence[int] = ()  # of the programs, as soon as they run
        self.marks: list[float] = []  # when steps of the script were done
        self._every = every_seconds
        self._scanner = Scanner()
        self._base = figures.take((), None).machine_used_bytes
        self._started = time.monotonic()
        self._over = threading.Event()
        self._wrong: list[Exception] = []
        self._thread = threading.Thread(target=self._go_on)

    def attend(self, scanner: Scanner) -> Recorder:
        """Count a scanner's cost, too. Its clock begins at 0 now."""
        self._scanner = scanner
        self._started = time.monotonic()
        return self

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(_END_SECONDS)

    @property
    def now(self) -> float:
        """Seconds since it started."""
        return time.monotonic() - self._started

    def mark(self) -> None:
        """Remember that a step of the script is done now.

        Raises:
            Wrong: as `wait`.
        """
        self.marks.append(self.now)
        self.wait(0.0)

    def wait(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            Wrong: looking has failed, or the scanner has ended.
        """
        self._over.wait(seconds)
        self._scanner.require_alive()
        if self._wrong:
            raise Wrong(f"looking failed: {self._wrong[0]}") from self._wrong[0]

    def _go_on(self) -> None:
        due = self._started
        while not self._over.wait(max(0.0, due - time.monotonic())):
            due = max(due + self._every, time.monotonic())
            try:
                self.looks.append(self._look())
            except Exception as error:
                self._wrong.append(error)
                self._over.set()

    def _look(self) -> Look:
        cost = self._scanner.cost()
        found = figures.take(self.pids, cost.daemon)
        return Look(
            seconds=self.now,
            machine_bytes=found.machine_used_bytes - self._base,
            programs_bytes=found.total_bytes + cost.other_bytes,
            cpu_seconds=cost.cpu_seconds,
        )
