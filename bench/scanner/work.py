"""What guests are asked to do, and what they must answer."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator

import msgspec

from bench.programs import guests
from bench.programs.crew import expect
from bench.programs.guests import Console, Image

PHASES = ("1", "2")  # and the archives, one for each
_PATIENCE_SECONDS = 300.0
_HELD = 50_000  # as guest_work.awk has it


class Piece(msgspec.Struct, frozen=True):
    """A piece of work that a guest has done, and done right."""

    phase: str
    guest: int
    name: str
    seconds: float


@contextlib.contextmanager
def image(archive_bytes: int) -> Iterator[Image]:
    """Have an image for guests that can work.

    Raises:
        Skipped: it cannot be had.
    """
    with guests.built(*PHASES, archive_bytes=archive_bytes) as built:
        yield built


class Work:
    """All work that there is for guests of one image."""

    def __init__(self, image: Image, rounds: int) -> None:
        self._rounds = rounds
        self._unpacked, self._read = {}, {}
        for name, files in image.archives.items():
            listed = "".join(f"{number}\n" for number in range(len(files)))
            self._unpacked[name] = f"{guests.md5(listed.encode())}  -"
            # As the shell sorts them.
            ordered = sorted(range(len(files)), key=str)
            whole = b"".join(files[number].read_bytes() for number in ordered)
            self._read[name] = f"{guests.md5(whole)}  -"

    def do(self, console: Console, guest: int, phase: str) -> Iterator[Piece]:
        """Have a guest unpack an archive, read all that it unpacked, and compute.

        Raises:
            Wrong: an answer was not what it must be.
        """
        seed = 7919 * (guest + 1) + int(phase)
        questions = {f"unpack {phase}": self._unpacked[phase]}
        for name in PHASES[: PHASES.index(phase) + 1]:
            questions[f"read {name}"] = self._read[name]
        questions[f"awk {seed} {self._rounds}"] = computed(seed, self._rounds)
        for question, wanted in questions.items():
            started = time.monotonic()
            answer = console.ask(question, _PATIENCE_SECONDS)
            seconds = time.monotonic() - started
            expect(answer, wanted, f"guest {guest}: {question}")
            yield Piece(phase, guest, question.split()[0], seconds)

    def check(self, console: Console, phases: tuple[str, ...] = PHASES) -> None:
        """Make sure that a guest still has all that it unpacked.

        Raises:
            Wrong: it has not.
        """
        for name in phases:
            answer = console.ask(f"read {name}", _PATIENCE_SECONDS)
            expect(answer, self._read[name], f"what was unpacked from {name}")


@functools.cache
def computed(seed: int, rounds: int) -> str:
    """Do what guest_work.awk does."""
    held: dict[int, tuple[int, int]] = {}
    x, total = seed, 0
    for number in range(rounds):
        x = (x * 1103 + 12345) % 1_000_003
        held[number % _HELD] = (x, number)
    for first, second in (held[number] for number in range(len(held))):
        total = (total * 31 + first + second) % 1_000_003
    return str(total)
