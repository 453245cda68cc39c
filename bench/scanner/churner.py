"""A program whose pages are equal in pairs, quiet for a while, and then all written.

    churner.py BYTES QUIET_SECONDS

Says "ready" when its memory is filled for the first time, and goes on for ever. It
ends with an error if it reads what it did not write.
"""

from __future__ import annotations

import mmap
import sys
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_CHUNK = 1 << 17  # words


def main() -> None:
    """Write, be quiet, read all of it, and so on."""
    size, quiet = int(sys.argv[1]), float(sys.argv[2])
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    halves = np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint64).reshape(2, -1)
    due = time.monotonic()
    for number in range(sys.maxsize):
        _write(halves, number)
        if number == 0:
            print("ready", flush=True)
        due = max(due + quiet, time.monotonic())
        time.sleep(due - time.monotonic())
        if not _holds(halves, number):
            sys.exit(f"round {number}: memory is not what was written")


def _write(halves: npt.NDArray[np.uint64], number: int) -> None:
    for first, chunk in _chunks(halves.shape[1], number):
        halves[:, first : first + len(chunk)] = chunk


def _holds(halves: npt.NDArray[np.uint64], number: int) -> bool:
    return all(
        np.array_equal(half[first : first + len(chunk)], chunk)
        for first, chunk in _chunks(halves.shape[1], number)
        for half in halves
    )


def _chunks(length: int, number: int) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
    """Make up what a half holds in a round, piece by piece: the same each time."""
    generator = np.random.default_rng(number)
    for first in range(0, length, _CHUNK):
        count = min(_CHUNK, length - first)
        yield first, generator.integers(0, 2**64, count, dtype=np.uint64)


if __name__ == "__main__":
    main()
