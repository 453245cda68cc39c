"""Another process that offers memory: `python -m bench.worker SIZE SEED`.

It fills a buffer and says so; then each line it reads makes it merge, and report
what came of it. It goes when its input ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

import sksm
from bench import memory, piped
from bench.results import Wrong
from sksm.spans import PAGE_SIZE


@dataclasses.dataclass
class Worker:
    """The other process, seen from here."""

    process: subprocess.Popen[str]
    pages: int

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def output(self) -> IO[str]:
        """What it answers by; readable when an answer is there."""
        assert self.process.stdout is not None
        return self.process.stdout

    def ask(self) -> None:
        """Tell it to merge."""
        assert self.process.stdin is not None
        self.process.stdin.write("merge\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for its report (`MergeReport.as_dict`), with the seconds of the call."""
        line = self.output.readline()
        if not line:
            raise Wrong(f"the worker ended with status {self.process.wait()}")
        return dict(json.loads(line))

    def merge(self, outcome: str) -> float:
        """Have it merge; gives the seconds, if that is what became of every page.

        The first call of a process includes connecting to the daemon.
        """
        self.ask()
        report = self.answer()
        if report[outcome] != self.pages:
            raise Wrong(f"{self.pages} pages should be {outcome}: {report}")
        return float(report["call_seconds"])


@contextlib.contextmanager
def holding(size: int, seed: int) -> Iterator[Worker]:
    """Start a worker whose `size` bytes are filled by `seed`; ready at entry."""
    with piped.module("bench.worker", size, seed) as process:
        worker = Worker(process, size // PAGE_SIZE)
        worker.answer()
        yield worker


def main() -> None:
    """Fill, then merge for each line read."""
    size, seed = map(int, sys.argv[1:])
    array = memory.buffer(size)
    memory.fill(array, seed)
    print("{}", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        report = sksm.merge(array)
        seconds = time.perf_counter() - start
        print(json.dumps({**report.as_dict(), "call_seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
