"""What merging some processes would save: everything that `sksm estimate` tells."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Sequence

from sksm.commands import sharing
from sksm.errors import ProcessGone, SksmError
from sksm.estimate import Estimate, Figures
from sksm.gain import Gain, gains
from sksm.hotness import Watch, keep_looking
from sksm.misaligned import find
from sksm.process import domain, guards, permission, runtimes, status
from sksm.process.other import OtherProcess
from sksm.report import Step
from sksm.spans import PAGE_SIZE


@dataclasses.dataclass(frozen=True, slots=True)
class Heat:
    """What watching found."""

    hot_bytes: int  # pages that were written to
    cold: Figures  # what remains if no hot page equals another


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What one process holds."""

    pid: int
    name: str
    figures: Figures
    heat: Heat | None  # None: nobody watched
    misaligned_bytes: int
    notes: list[str]  # why a merge would leave it alone


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """A process that could not be looked at."""

    pid: int
    error: SksmError


@dataclasses.dataclass(frozen=True, slots=True)
class Outlook:
    """What all of them hold, and what merging would bring."""

    total: Figures
    heat: Heat | None
    misaligned_bytes: int
    misaligned_whole: bool  # else there may be more
    gains: list[Gain]  # without hot pages, if these are known
    processes: list[Finding]
    failures: list[Failure]
    seconds: float


def survey(pids: Sequence[int], watch: float | None, step: Step) -> Outlook:
    """Read processes, watch them for so many seconds, and compare.

    Only processes of one trust domain are compared with each other, as only these
    may share. One that cannot be looked at is a failure in the answer, and so is one
    that ends meanwhile.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as scope:
        crews, failures = _read(pids, scope, step)
        if watch and crews:
            watches = [Watch(crew.estimate, crew.spaces) for crew in crews]
            keep_looking(watches, watch, step("watching", watch))
            for crew, watched in zip(crews, watches, strict=True):
                crew.heats, crew.heat = _heats(watched)
        places = [
            find(crew.estimate, {space.pid: space for space in crew.spaces})
            for crew in crews
        ]
    failures += [
        Failure(space.pid, ProcessGone(f"process {space.pid} ended meanwhile"))
        for crew in crews
        for space in crew.spaces
        if space.pid not in crew.estimate.holdings
    ]
    total = _sum(crew.estimate.total() for crew in crews)
    heats = [crew.heat for crew in crews if crew.heat]
    hot_bytes = sum(heat.hot_bytes for heat in heats)
    heat = Heat(hot_bytes, _sum(heat.cold for heat in heats)) if heats else None
    processes = [
        _finding(crew, pid, found.bytes_of[pid])
        for crew, found in zip(crews, places, strict=True)
        for pid in crew.estimate.holdings
    ]
    return Outlook(
        total,
        heat,
        sum(found.total_bytes for found in places),
        all(found.whole for found in places),
        gains(heat.cold if heat else total, sharing.vma_cost()[0]),
        sorted(processes, key=lambda finding: pids.index(finding.pid)),
        failures,
        time.monotonic() - started,
    )


@dataclasses.dataclass(slots=True)
class _Crew:
    """Processes of one trust domain."""

    estimate: Estimate = dataclasses.field(default_factory=Estimate)
    spaces: list[OtherProcess] = dataclasses.field(default_factory=list)
    heats: dict[int, Heat] = dataclasses.field(default_factory=dict)
    heat: Heat | None = None


def _read(
    pids: Sequence[int], scope: contextlib.ExitStack, step: Step
) -> tuple[list[_Crew], list[Failure]]:
    crews: dict[domain.Domain, _Crew] = {}
    failures: list[Failure] = []
    for pid in pids:
        try:
            permission.require_memory(pid)
            space = scope.enter_context(OtherProcess(pid))
            crew = crews.setdefault(domain.of(pid), _Crew())
            tell = step(f"reading {pid}", status.private_pages(pid))
            if not crew.estimate.add(space, tell):
                raise ProcessGone(f"process {pid} ended meanwhile")
            crew.spaces.append(space)
        except OSError as error:
            failures.append(Failure(pid, permission.explain(pid, error)))
        except SksmError as error:
            failures.append(Failure(pid, error))
    return [crew for crew in crews.values() if crew.spaces], failures


def _sum(parts: Iterable[Figures]) -> Figures:
    total = Figures()
    for part in parts:
        total += part
    return total


def _finding(crew: _Crew, pid: int, misaligned_bytes: int) -> Finding:
    figures, heat = crew.estimate.figures(pid), crew.heats.get(pid)
    return Finding(pid, status.name(pid), figures, heat, misaligned_bytes, _notes(pid))


def _heats(watched: Watch) -> tuple[dict[int, Heat], Heat]:
    """Sum up the hot pages of each process, and of all."""
    cold = watched.cold()
    hot = {pid: int(flags.sum()) * PAGE_SIZE for pid, flags in watched.hot.items()}
    heats = {pid: Heat(nbytes, cold.figures(pid)) for pid, nbytes in hot.items()}
    return heats, Heat(sum(hot.values()), cold.total())


def _notes(pid: int) -> list[str]:
    """Say what would keep a merge from this process, as far as can be seen."""
    with contextlib.suppress(OSError):  # it ended, or its files are not ours to see
        if reason := guards.objection_to(pid):
            return [f"merging would be refused: {reason}"]
        if reason := runtimes.doubt(pid):
            return [f"the engine pool would refuse it: {reason}"]
    return []
