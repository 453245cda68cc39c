"""The same programs without a scanner, and under `sksm watch`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

from bench.programs.load import Phase
from bench.results import Skipped, Wrong
from bench.scanner import scanners, watching
from bench.scanner.recording import Record, Recorder
from bench.scanner.scanners import Scanner

WITHOUT, WITH = "without", "with sksm"


class Programs(NamedTuple):
    """Programs that run."""

    pids: list[int]
    work: Callable[[Recorder], None]  # has them do their work
    check: Callable[[], None]  # makes sure that they are as they must be


class Run(Record):
    """All that was seen of the programs once."""

    phase: Phase | None = None  # how they answered, if they were asked


# Starts the programs; what is done with them goes into the run.
Start: TypeAlias = Callable[[Run], contextlib.AbstractContextManager[Programs]]


def measure(
    start: Start, every: float, watch: watching.Options, tell: Callable[[str], None]
) -> list[Run]:
    """Run the programs both ways."""
    return [_measure(Run(name), start, every, watch, tell) for name in (WITHOUT, WITH)]


def _measure(
    run: Run,
    start: Start,
    every: float,
    watch: watching.Options,
    tell: Callable[[str], None],
) -> Run:
    try:
        scanners.sweep()
        recorder = Recorder(every)
        tell(f"{run.name}: the programs start")
        with start(run) as programs:
            recorder.pids = programs.pids
            scanning = _scanner(run.name, programs.pids, watch)
            with scanning as scanner, recorder.attend(scanner):
                run.looks = recorder.looks
                tell(f"{run.name}: the programs work")
                programs.work(recorder)
            if isinstance(scanner, watching.Watch):
                run.epochs = scanner.epochs
            tell(f"{run.name}: asking for everything they hold")
            programs.check()
    except Skipped as reason:
        run.skipped = str(reason)
    except Wrong as error:
        run.failed = str(error)
    return run


@contextlib.contextmanager
def _scanner(name: str, pids: list[int], watch: watching.Options) -> Iterator[Scanner]:
    if name == WITH:
        what = (word for pid in pids for word in ("--pid", str(pid)))
        with watching.watching(watch, *what) as scanner:
            yield scanner
    else:
        with scanners.nobody() as scanner:
            yield scanner
