"""What merging some processes would save: everything that `sksm estimate` tells."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence

import psutil

from sksm.commands import sharing
from sksm.errors import ProcessGone, SksmError
from sksm.estimate import Estimate, Figures
from sksm.gain import Gain, gains
from sksm.hotness import Watch
from sksm.misaligned import Misaligned, find
from sksm.process import guards, permission, runtimes
from sksm.process.other import OtherProcess
from sksm.spans import PAGE_SIZE

# Starts a step: what it is called, and how much there is to do. Gives what moves
# it on by so much.
Step = Callable[[str, float], Callable[[float], None]]


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
    misaligned: Misaligned
    gains: list[Gain]  # without hot pages, if these are known
    processes: list[Finding]
    failures: list[Failure]
    seconds: float


def survey(pids: Sequence[int], watch: float | None, step: Step) -> Outlook:
    """Read processes, watch them for so many seconds, and compare.

    A process that cannot be looked at is a failure in the answer, and so is one that
    ends meanwhile.
    """
    started = time.monotonic()
    estimate = Estimate()
    with contextlib.ExitStack() as scope:
        spaces, failures = _read(estimate, pids, scope, step)
        watched = _watch(estimate, spaces, watch, step) if watch and spaces else None
        misaligned = find(estimate, {space.pid: space for space in spaces})
    failures += [
        Failure(space.pid, ProcessGone(f"process {space.pid} ended meanwhile"))
        for space in spaces
        if space.pid not in estimate.holdings
    ]
    heats, heat = _heats(watched) if watched else ({}, None)
    total = estimate.total()
    processes = [
        Finding(
            pid,
            _name(pid),
            estimate.figures(pid),
            heats.get(pid),
            misaligned.bytes_of[pid],
            _notes(pid),
        )
        for pid in estimate.holdings
    ]
    return Outlook(
        total,
        heat,
        misaligned,
        gains(heat.cold if heat else total, sharing.vma_cost()[0]),
        processes,
        failures,
        time.monotonic() - started,
    )


def _read(
    estimate: Estimate, pids: Sequence[int], scope: contextlib.ExitStack, step: Step
) -> tuple[list[OtherProcess], list[Failure]]:
    spaces: list[OtherProcess] = []
    failures: list[Failure] = []
    for pid in pids:
        try:
            permission.require_memory(pid)
            space = scope.enter_context(OtherProcess(pid))
            if not estimate.add(space, step(f"reading {pid}", _private_pages(pid))):
                raise ProcessGone(f"process {pid} ended meanwhile")
            spaces.append(space)
        except OSError as error:
            failures.append(Failure(pid, permission.explain(pid, error)))
        except SksmError as error:
            failures.append(Failure(pid, error))
    return spaces, failures


def _private_pages(pid: int) -> int:
    kib = guards.status_of(pid).get("RssAnon", "0 kB").split()[0]
    return int(kib) * 1024 // PAGE_SIZE


def _watch(
    estimate: Estimate, spaces: Sequence[OtherProcess], seconds: float, step: Step
) -> Watch:
    watch = Watch(estimate, spaces)
    watch.run(seconds, step("watching", seconds))
    return watch


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


def _name(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).name()
    return "?"
