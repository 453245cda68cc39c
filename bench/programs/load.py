"""Clients that ask and check, and how the answers fared while something went on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from bench.programs.crew import Client, Crew
from bench.results import Wrong

# Between an answer and the next question, so that programs and clients together
# leave the processors some time: a queue would show nothing but the queue.
_PAUSE_SECONDS = 0.01
_END_SECONDS = 60.0


class Answer(NamedTuple):
    """When it was asked for, and when it was there; by `time.monotonic`."""

    asked: float
    there: float


class Phase(msgspec.Struct, frozen=True):
    """How answers came in a stretch of time."""

    answers: int
    seconds: float
    p50_seconds: float
    p99_seconds: float
    max_seconds: float

    @property
    def answers_per_second(self) -> float:
        """The rate, over all clients."""
        return self.answers / self.seconds


class Load:
    """All clients of a crew, asking for as long as the block lasts."""

    def __init__(self, crew: Crew) -> None:
        self.phases: dict[str, Phase] = {}
        self._over = threading.Event()
        self._wrong: list[Exception] = []
        self._answers: list[list[Answer]] = [[] for _ in crew.clients]
        self._threads = [
            threading.Thread(target=self._ask, args=pair)
            for pair in zip(crew.clients, self._answers, strict=True)
        ]
        if crew.extra:
            extra = threading.Thread(target=self._ask, args=(crew.extra, []))
            self._threads.append(extra)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(_END_SECONDS)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Call the block's time `name`; at its end, every answer was right so far.

        Raises:
            Wrong: an answer was not, or none came.
        """
        start = time.monotonic()
        yield
        stop = time.monotonic()
        self.require_right()
        if self._answers:
            self.phases[name] = self._phase(start, stop)

    def go_on(self, seconds: float) -> None:
        """Let the clients ask for a while.

        Raises:
            Wrong: an answer was wrong.
        """
        self._over.wait(max(0.0, seconds))
        self.require_right()

    def require_right(self) -> None:
        """Make sure that all answers were right so far, and no client is stuck.

        Raises:
            Wrong: they were not.
        """
        if self._wrong:
            raise Wrong(str(self._wrong[0])) from self._wrong[0]

    def _phase(self, start: float, stop: float) -> Phase:
        # An answer counts where it arrived: one that a stop held up shows there.
        times = sorted(
            answer.there - answer.asked
            for answers in self._answers
            for answer in list(answers)
            if start <= answer.there < stop
        )
        if not times:
            return Phase(0, *[stop - start] * 4)
        p50, p99 = (times[len(times) * part // 100] for part in (50, 99))
        return Phase(len(times), stop - start, p50, p99, times[-1])

    def _ask(self, client: Client, answers: list[Answer]) -> None:
        while not self._over.is_set():
            asked = time.monotonic()
            try:
                client()
            except Exception as error:
                self._wrong.append(error)
                self._over.set()
                return
            answers.append(Answer(asked, time.monotonic()))
            self._over.wait(_PAUSE_SECONDS)


def once(clients: Sequence[Client]) -> None:
    """Have every client ask once, one after the other."""
    for client in clients:
        client()
