"""Memory that nobody has offered before: every page goes into the pool."""

from __future__ import annotations

import os

import sksm
from bench import clock, daemon, floor, memory
from bench.clock import Times
from bench.memory import Words
from bench.results import Goal, Options, Row, Wrong

_SEED = 2
_OF_THE_FLOOR = Goal(at_least=0.6)


def measure(options: Options) -> Row:
    """Measure floor and ours in turns, each with an empty pool of its own."""
    size = options.size_bytes
    memory.warm_up(4 * size)
    contents = memory.buffer(size)
    memory.fill(contents, _SEED)
    lows, ours = [], []
    for count in range(options.rounds + 1):
        low, our = _floor(contents), _ours(contents)
        if count:
            lows.append(low)
            ours.append(our)
    return Row(clock.against_floor(size, lows, ours, _OF_THE_FLOOR))


def _floor(contents: Words) -> Times:
    array = memory.buffer(contents.nbytes)
    array[:] = contents
    pools: list[int] = []
    try:
        return clock.timed(array, lambda array: pools.append(floor.store(array)))
    finally:
        for fd in pools:
            os.close(fd)


def _ours(contents: Words) -> Times:
    array = memory.buffer(contents.nbytes)
    array[:] = contents
    reports: list[sksm.MergeReport] = []
    with daemon.own():
        times = clock.timed(array, lambda array: reports.append(sksm.merge(array)))
    if reports[0].stored != memory.pages(array):
        raise Wrong(f"not all of {memory.pages(array)} pages are new: {reports[0]}")
    if not floor.equal(array, contents):
        raise Wrong("the bytes changed")
    return times
