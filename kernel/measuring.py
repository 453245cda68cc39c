"""The same data merged by MADV_MERGE, by the pool and by ksmd: run inside a guest.

`python -m kernel.measuring MIB` prints seconds as JSON, a list of rounds for each
way. It fails if a way did not merge all of the data, or changed it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

import sksm
from bench import ksmd, memory
from bench.memory import Words
from bench.results import Wrong
from sksm.linux import libc, pagemap
from sksm.spans import Span

ROUNDS = 3


def main() -> None:
    """Measure the ways in turns, each time on new pages.

    Each in a process of its own: KSM counts what another way left behind in it.
    """
    size, *rest = sys.argv[1:]
    if rest:
        way, seed = rest
        contents = memory.buffer(int(size) << 20)
        memory.fill(contents, int(seed))
        json.dump(WAYS[way](contents), sys.stdout)
        return
    found: dict[str, list[float]] = {}
    for seed in map(str, range(ROUNDS)):
        for way in WAYS:
            again = [sys.executable, "-m", "kernel.measuring", size, way, seed]
            told = json.loads(subprocess.check_output(again))
            for name, seconds in told.items():
                found.setdefault(f"{way}, {name}", []).append(seconds)
    json.dump(found, sys.stdout)


def _by_call(contents: Words) -> dict[str, float]:
    return _one_after_the_other(_offer, contents)


def _by_pool(contents: Words) -> dict[str, float]:
    return _one_after_the_other(sksm.merge, contents)


def _by_ksmd(contents: Words) -> dict[str, float]:
    with ksmd.borrowed() as without:
        if without:
            raise Wrong(f"ksmd: {without}")
        return {"both": ksmd.merge(contents).seconds}


WAYS: dict[str, Callable[[Words], dict[str, float]]] = {
    "MADV_MERGE": _by_call,
    "pool": _by_pool,
    "ksmd wide open": _by_ksmd,
}


def _one_after_the_other(
    merge: Callable[[Words], object], contents: Words
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
        raise Wrong("pages were left unmerged")
    if not ((one == contents).all() and (two == contents).all()):
        raise Wrong("what was there was changed")
    return {"new": seconds[0], "a copy": seconds[1]}


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
