"""A program that knows nothing of sksm: `python -m bench.target SIZE SEED THREADS OWN`.

It holds a buffer filled by the seed, tells its address, and goes on looking at it,
with as many threads that wake up all the time. Of OWN bytes more nobody has the like.
Each line it reads makes it hold a new buffer; it goes when its input ends.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from bench import memory, piped
from bench.results import Wrong
from sksm.spans import PAGE_SIZE, Span


class Target:
    """The other process, seen from here."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.pid = process.pid
        self._process = process

    def buffer(self) -> Span:
        """Say where its buffer is, once it is filled."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip():
            raise Wrong(f"the target ended with status {self._process.wait()}")
        start, size = map(int, line.split())
        return Span(start, start + size)

    def renew(self) -> Span:
        """Have it check its buffer and hold a new one, of its own pages."""
        assert self._process.stdin is not None
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        return self.buffer()


@contextlib.contextmanager
def running(size: int, seed: int, threads: int, own: int = 0) -> Iterator[Target]:
    """Start a target; it is ended with the block."""
    with piped.module("bench.target", size, seed, threads, own) as process:
        yield Target(process)


def main() -> None:
    """Fill, tell, and fill again for each line read."""
    size, seed, threads, own = map(int, sys.argv[1:])
    unlike = memory.buffer(own + PAGE_SIZE)
    memory.fill(unlike, int.from_bytes(os.urandom(8)))
    for _ in range(threads - 1):
        threading.Thread(target=_wake_up, daemon=True).start()
    total = None
    while True:
        array = memory.buffer(size + PAGE_SIZE)  # the last page is never merged
        memory.fill(array, seed)
        total = total or int(array.sum())
        print(array.ctypes.data, size, flush=True)
        if not sys.stdin.readline():
            return
        if int(array.sum()) != total:
            sys.exit("the bytes changed")
        del array


def _wake_up() -> None:
    while True:
        time.sleep(0.002)


if __name__ == "__main__":
    main()
