"""What merging a crew from outside brings, by the kernel's word, and costs."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from typing import Any

import msgspec

from bench.programs import CREWS, commands
from bench.programs.commands import Done
from bench.programs.crew import Crew
from bench.programs.load import Load, Phase
from bench.results import Skipped, Wrong
from sksm.commands.demonstration import figures, run
from sksm.commands.demonstration.figures import Snapshot
from sksm.errors import DaemonUnreachable
from sksm.process import domain

_MODULES = {"forked": "python_crews", "working": "python_crews"}
_MODULES["separate"] = "python_crews"
BEFORE, DURING, AFTER = "before", "during", "after"


class Options(msgspec.Struct, frozen=True):
    """What to measure."""

    before_seconds: float = 10.0  # of load, to compare with
    after_seconds: tuple[float, ...] = (0.0, 10.0, 60.0)  # when to look, after it
    engine: str | None = None  # for the command to choose


class Look(msgspec.Struct, frozen=True):
    """What the kernel says some time after the merge."""

    seconds: float
    figures: Snapshot


class Outcome(msgspec.Struct):
    """All that came out for a crew, or why nothing did."""

    name: str
    title: str
    processes: int = 0
    before: Snapshot | None = None
    looks: list[Look] = []
    estimate: Done | None = None
    merge: Done | None = None
    phases: dict[str, Phase] = {}
    notes: list[str] = []
    skipped: str | None = None
    failed: str | None = None

    def net_bytes(self, look: Look) -> int:
        """What the crew and sksm take less than before; negative if more."""
        assert self.before is not None
        return self.before.total_bytes - look.figures.total_bytes

    def machine_net_bytes(self, look: Look) -> int:
        """What the whole machine uses less, whatever else ran on it."""
        assert self.before is not None
        return self.before.machine_used_bytes - look.figures.machine_used_bytes

    @property
    def duplicate_bytes(self) -> int | None:
        """What `sksm estimate` said could be saved."""
        return duplicates(self.estimate.output) if self.estimate else None

    def of_estimate(self, look: Look) -> float | None:
        """Which part of that came back, net."""
        if not self.duplicate_bytes:
            return None
        return self.net_bytes(look) / self.duplicate_bytes

    def of_before(self, phase: str, figure: Callable[[Phase], float]) -> float | None:
        """Hold a figure of a phase against what it was before the merge."""
        if phase not in self.phases or BEFORE not in self.phases:
            return None
        before = figure(self.phases[BEFORE])
        return figure(self.phases[phase]) / before if before else None


def duplicates(output: dict[str, Any]) -> int:
    """Read from the JSON of `sksm estimate` what could be saved."""
    total = output["total"]
    return int(total["duplicate_bytes"]) + int(total["zero_bytes"])


def start(name: str) -> contextlib.AbstractContextManager[Crew]:
    """Start the crew of that name."""
    module = importlib.import_module(f"bench.programs.{_MODULES.get(name, name)}")
    crew: contextlib.AbstractContextManager[Crew] = getattr(module, name)()
    return crew


def measure(name: str, options: Options, tell: Callable[[str], None]) -> Outcome:
    """Run a crew, merge it, and watch it for a while; see `Outcome`.

    Args:
        tell: hears what is going on.
    """
    outcome = Outcome(name, CREWS[name])
    try:
        with run.own_daemon():
            tell("the programs start")
            with start(name) as crew:
                _measure(crew, outcome, options, tell)
    except Skipped as reason:
        outcome.skipped = str(reason)
    except Wrong as error:
        outcome.failed = str(error)
    return outcome


def _measure(
    crew: Crew, outcome: Outcome, options: Options, tell: Callable[[str], None]
) -> None:
    outcome.notes = crew.notes
    outcome.processes = len(crew.pids)
    tell("sksm estimate")
    outcome.estimate = commands.run("estimate", crew.pids)
    engine = ["--engine", options.engine] if options.engine else []
    with Load(crew) if crew.busy else contextlib.nullcontext() as load:
        with _phase(load, BEFORE):
            _wait(load, options.before_seconds, tell)
        outcome.before = _take(crew)
        tell("sksm merge")
        with _phase(load, DURING):
            outcome.merge = commands.run("merge", crew.pids, *engine)
        merged = time.monotonic()
        for seconds in options.after_seconds:
            with _phase(load, AFTER):
                _wait(load, merged + seconds - time.monotonic(), tell)
            found = _take(crew)
            outcome.looks.append(Look(seconds, found))
        if load:
            outcome.phases = load.phases
    tell("asking for everything they hold")
    crew.require_alive()
    crew.inspect()
    crew.require_alive()


def _take(crew: Crew) -> Snapshot:
    """Read the kernel's figures; sksmd counts from when the command started it.

    Raises:
        Wrong: one of the programs has ended.
    """
    crew.require_alive()
    try:
        daemon = run.status(domain.of(crew.pids[0]))
    except DaemonUnreachable:
        daemon = None
    return figures.take(crew.family, daemon)


def _phase(load: Load | None, name: str) -> contextlib.AbstractContextManager[None]:
    return load.phase(name) if load else contextlib.nullcontext()


def _wait(load: Load | None, seconds: float, tell: Callable[[str], None]) -> None:
    if seconds <= 0:
        return
    tell(f"{seconds:.0f} s of {'checked load' if load else 'idleness'}")
    if load:
        load.go_on(seconds)
    else:
        time.sleep(seconds)  # what is measured is what time does to it
