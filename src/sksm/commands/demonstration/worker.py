"""A worker of the demo: a program of its own that loads data, and merges it.

It reads one word a line from stdin and answers each with a line of JSON. When
stdin ends, it ends: nobody is left behind, however the demo goes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import sksm
from sksm.commands.demonstration.data import load
from sksm.errors import SksmError
from sksm.linux import pagemap
from sksm.spans import PAGE_SIZE, whole_pages


class Worker:
    """The commands, each a method that returns what to answer.

    Args:
        path: the file that every worker loads.
        private_bytes: size of the part that only this worker has.
        seed: what that part is made from.
    """

    def __init__(self, path: Path, private_bytes: int, seed: int) -> None:
        self._path = path
        self._private_bytes = private_bytes
        self._seed = seed

    def load(self) -> dict[str, Any]:
        """Read the file, and make up a part that no other worker has."""
        self._data = load(self._path)
        generator = np.random.default_rng(self._seed)
        self._private = sksm.empty(self._private_bytes, np.uint8)
        self._private[:] = np.frombuffer(generator.bytes(self._private_bytes), np.uint8)
        return {
            "data_bytes": self._data.contents.nbytes,
            "arrays": len(self._data.arrays),
        }

    def checksum(self) -> dict[str, Any]:
        """Read every byte."""
        return {
            "data": _digest(self._data.contents),
            "private": _digest(self._private),
        }

    def merge(self) -> dict[str, Any]:
        """Call sksm, and time the call as a program would."""
        start = time.perf_counter()
        report = sksm.merge(self._data.contents)
        wall = time.perf_counter() - start
        return {**report.as_dict(), "seconds": wall}

    def look(self, page: str) -> dict[str, Any]:
        """Say what the kernel shows of the data, and of one page of it.

        A page is shared if it is the pool's file's, private if it is anonymous
        (pagemap bit 61). Only root sees the number of the frame.
        """
        contents = self._data.contents
        span = whole_pages(contents.ctypes.data, contents.nbytes)
        table = os.open("/proc/self/pagemap", os.O_RDONLY)
        try:
            entries = pagemap.entries(table, span)
        finally:
            os.close(table)
        shared = entries & np.uint64(pagemap.ENTRY_FILE) != 0
        entry = int(entries[int(page)])
        return {
            "shared_pages": int(shared.sum()),
            "shared": bool(shared[int(page)]),
            "frame": entry & pagemap.ENTRY_FRAME,
        }

    def write(self, page: str) -> dict[str, Any]:
        """Change one byte of a page; the second time, change it back."""
        self._data.contents[int(page) * PAGE_SIZE] ^= 0xFF
        return {}

    def ksm(self, size: str) -> dict[str, Any]:
        """Offer two copies of the head of the file to the kernel's KSM."""
        sample = np.fromfile(self._path, np.uint8, int(size))
        self._copies = []
        for _ in range(2):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            copy = mmap.mmap(-1, int(size), flags=flags)
            copy.madvise(mmap.MADV_NOHUGEPAGE)
            copy.write(sample.data)
            copy.madvise(mmap.MADV_MERGEABLE)
            self._copies.append(copy)
        return {}


def _digest(contents: npt.NDArray[np.uint8]) -> str:
    return hashlib.sha256(contents.data).hexdigest()


def main() -> None:
    """Answer until stdin ends."""
    path, private_bytes, seed = sys.argv[1:]
    worker = Worker(Path(path), int(private_bytes), int(seed))
    for line in sys.stdin:
        name, *args = line.split()
        try:
            answer = getattr(worker, name)(*args)
        except SksmError as error:
            answer = {"error": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
