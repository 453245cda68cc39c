"""The same data merged by MADV_MERGE, by the pool and by ksmd: run inside a guest.

`python -m kernel.measuring MIB` prints seconds as JSON, a list of rounds for each
way. It fails if a way did not merge all of the data, or changed it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np
from bench import ksmd, memory
from bench.memory import Words
from bench.results import Wrong

import sksm
from sksm.linux import libc, pagemap
from sksm.spans import Span

ROUNDS = 3


def main() -> None:
    """Measure the ways in turns, each time on new pages."""
    found: dict[str, list[float]] = {}
    size = int(sys.argv[1]) << 20
    for seed in range(ROUNDS):
        contents = memory.buffer(size)
        memory.fill(contents, seed)
        seconds = {
            **_one_after_the_other("MADV_MERGE", _offer, contents),
            **_one_after_the_other("pool", sksm.merge, contents),
        }
        with ksmd.borrowed() as without:
            if without:
                raise Wrong(f"ksmd: {without}")
            seconds["ksmd wide open, both"] = ksmd.merge(contents).seconds
        for name, value in seconds.items():
            found.setdefault(name, []).append(value)
    json.dump(found, sys.stdout)


def _one_after_the_other(
    name: str, merge: Callable[[Words], object], contents: Words
) -> dict[str, float]:
    """Merge two equal buffers: what is new first, then its copy."""
    one, two = (memory.buffer(contents.nbytes) for _ in range(2))
    seconds = []
    for each in (one, two):
        each[:] = contents
        started = time.perf_counter()
        merge(each)
        seconds.append(time.perf_counter() - started)
    if _sharing(one, two) < 0.999 * memory.pages(contents):
        raise Wrong(f"{name} left pages unmerged")
    if not ((one == contents).all() and (two == contents).all()):
        raise Wrong(f"{name} changed what was there")
    return {f"{name}, new": seconds[0], f"{name}, a copy": seconds[1]}


def _offer(words: Words) -> None:
    memory.advise(words, libc.MADV_MERGE)


def _sharing(one: Words, two: Words) -> int:
    """Count the pages that have the same frame in both."""
    both = []
    with open("/proc/self/pagemap", "rb", buffering=0) as table:
        for each in (one, two):
            start = each.ctypes.data
            entries = pagemap.entries(table.fileno(), Span(start, start + each.nbytes))
            both.append(entries & np.uint64(pagemap.ENTRY_FRAME))
    return int((both[0] == both[1]).sum())


if __name__ == "__main__":
    main()
