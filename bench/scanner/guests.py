"""Virtual machines that boot, work and rest, under one scanner after another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import msgspec

from bench.programs import guests
from bench.programs.guests import Console, Image
from bench.results import Skipped, Wrong
from bench.scanner import scanners, watching
from bench.scanner.recording import Record, Recorder
from bench.scanner.scanners import NOTHING, SKSM, Scanner
from bench.scanner.work import PHASES, Piece, Work

Tell = Callable[[str], None]


class Options(msgspec.Struct, frozen=True):
    """What to have the guests do."""

    guests: int = 3
    idle_seconds: tuple[float, ...] = (20.0, 30.0, 60.0)  # after boot, and each work
    every_seconds: float = 0.5
    archive_bytes: int = 28 << 20
    rounds: int = 100_000  # of computing
    watch: watching.Options = watching.Options()


class Case(Record):
    """All that was seen under one scanner."""

    pieces: list[Piece] = msgspec.field(default_factory=list)
    boot_seconds: float = 0.0
    worked_seconds: tuple[float, ...] = ()  # when each phase of work was done

    @property
    def work_seconds(self) -> float:
        """How long the guests worked."""
        return sum(piece.seconds for piece in self.pieces)


def measure(name: str, image: Image, options: Options, tell: Tell) -> Case:
    """Run the script under one scanner; see `Case`."""
    case = Case(name)
    try:
        scanners.sweep()
        with contextlib.ExitStack() as stack:
            _measure(case, image, options, stack, tell)
    except Skipped as reason:
        case.skipped = str(reason)
    except Wrong as error:
        case.failed = str(error)
    return case


def _measure(
    case: Case, image: Image, options: Options, stack: contextlib.ExitStack, tell: Tell
) -> None:
    work = Work(image, options.rounds)
    recorder = Recorder(options.every_seconds)
    with _scanner(case.name, options) as scanner, recorder.attend(scanner):
        case.looks, case.marks = recorder.looks, recorder.marks
        consoles = stack.enter_context(guests.started(image, options.guests))
        recorder.pids = [console.pid for console in consoles]
        _boot(case, consoles, recorder, tell)
        _rest(options.idle_seconds[0], recorder, tell)
        for phase, seconds in zip(PHASES, options.idle_seconds[1:], strict=True):
            for guest, console in enumerate(consoles):
                tell(f"work {phase} in guest {guest}")
                for piece in work.do(console, guest, phase):
                    case.pieces.append(piece)
                    recorder.mark()
            case.worked_seconds += (recorder.now,)
            _rest(seconds, recorder, tell)
    if isinstance(scanner, watching.Watch):
        case.epochs = scanner.epochs
    tell("asking for everything they hold")
    guests.inspect(image, consoles)
    for console in consoles:
        work.check(console)


@contextlib.contextmanager
def _scanner(name: str, options: Options) -> Iterator[Scanner]:
    with contextlib.ExitStack() as stack:
        if name == NOTHING:
            yield stack.enter_context(scanners.nobody())
        elif name == SKSM:
            yield stack.enter_context(watching.watching(options.watch, "--qemu"))
        else:
            yield stack.enter_context(scanners.ksmd_at_work(name))


def _boot(case: Case, consoles: list[Console], recorder: Recorder, tell: Tell) -> None:
    tell("the guests boot")
    for console in consoles:
        console.wait_for_boot()
    case.boot_seconds = max(console.boot_seconds for console in consoles)
    recorder.mark()


def _rest(seconds: float, recorder: Recorder, tell: Tell) -> None:
    tell(f"{seconds:.0f} s of idleness")
    recorder.wait(seconds)
    recorder.mark()
