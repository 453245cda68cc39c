"""Times its own calls: `python -m bench.caller ROUNDS PAGES MIB`.

Under `sksm run` or not. It has MIB of small pages besides, that nobody offers.

Prints JSON: seconds of each madvise, of MADV_MERGE and of an ordinary advice.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

from bench import memory
from sksm.linux import libc
from sksm.spans import PAGE_SIZE

_SEED = 5
_ORDINARY_CALLS = 2000


def main() -> None:
    """Call, and say how long each call took."""
    rounds, pages, mib = map(int, sys.argv[1:])
    array = memory.buffer(pages * PAGE_SIZE + PAGE_SIZE)
    memory.fill(array, _SEED)
    # Below it, where the text of smaps comes first.
    besides = memory.buffer(mib << 20)
    besides[:: PAGE_SIZE // 8] = 1
    at, size = array.ctypes.data, pages * PAGE_SIZE
    merges = []
    if pages:
        for _ in range(rounds):
            array[:: PAGE_SIZE // 8] += 0  # a private copy again
            merges.append(_timed(at, size, libc.MADV_MERGE))
    ordinary = [_timed(at, PAGE_SIZE, _NORMAL) for _ in range(_ORDINARY_CALLS)]
    json.dump({"merges": merges, "ordinary": ordinary}, sys.stdout)


_NORMAL = 0
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def _timed(at: int, size: int, advice: int) -> float:
    started = time.perf_counter()
    # SAFETY: advice that keeps contents, on the array's own pages.
    failed = _madvise(at, size, advice)
    seconds = time.perf_counter() - started
    if failed:
        sys.exit(f"madvise {advice}: errno {ctypes.get_errno()}")
    return seconds


if __name__ == "__main__":
    main()
