"""One page a call: what a call costs by itself."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np

import sksm
from bench import daemon, floor, memory
from bench.memory import Words
from bench.results import Goal, Measure, Options, Row, Wrong
from sksm.spans import PAGE_SIZE

_SEED = 4
_CALLS = 1000  # a round, or as many as fit into
_ROUND_SECONDS = 2.0
_WARM_CALLS = 50
_ARRAY_PAGES = 64
_MEDIAN = Goal(at_most=150e-6)


def measure(options: Options) -> Row:
    """Measure in a process that holds little."""
    return measure_beside(options, 0)


def measure_beside(options: Options, held_bytes: int) -> Row:
    """Measure in a process that holds `held_bytes` of touched memory besides."""
    held = memory.buffer(held_bytes or PAGE_SIZE)
    held[:] = 1
    with daemon.own():
        twin = _page()
        sksm.merge(twin)
        again, fresh, inside, low = [], [], [], []
        pool = floor.Pool(PAGE_SIZE, _SEED)
        for _ in range(options.rounds):
            low.append(_times(_floor(pool)))
            again.append(_times(_rewritten()))
            fresh.append(_times(_new()))
            inside.append(_times(_inside()))
    row = Row(notes=[f"up to {_CALLS} calls in {_ROUND_SECONDS:.0f} s make a round"])
    row.measures = [
        *_median_and_p99("floor", "floor, median", low),
        *_median_and_p99("rewritten", "merged, then written", again, _MEDIAN),
        *_median_and_p99("fresh", "new page", fresh, _MEDIAN),
        *_median_and_p99("inside", "page inside an array", inside, _MEDIAN),
    ]
    return row


def _times(calls: Iterator[float]) -> list[float]:
    for _ in itertools.islice(calls, _WARM_CALLS):
        pass
    stop = time.monotonic() + _ROUND_SECONDS
    in_time = itertools.takewhile(lambda _: time.monotonic() < stop, calls)
    return list(itertools.islice(in_time, _CALLS))


def _median_and_p99(
    name: str, label: str, rounds: list[list[float]], goal: Goal | None = None
) -> list[Measure]:
    median = [float(np.median(calls)) for calls in rounds]
    p99 = [float(np.percentile(calls, 99)) for calls in rounds]
    return [
        Measure(f"{name}_median_seconds", label, median, goal),
        Measure(f"{name}_p99_seconds", "  p99", p99),
    ]


def _floor(pool: floor.Pool) -> Iterator[float]:
    page = _page()
    cover = floor.of_one_page(pool, page)
    while True:
        page[0] = page[0]  # a private copy again
        start = time.perf_counter()
        cover()
        yield time.perf_counter() - start


def _rewritten() -> Iterator[float]:
    """Merge one page over and over, written in between."""
    page = _page()
    while True:
        page[0] = page[0]
        yield _merge(page)


def _new() -> Iterator[float]:
    """Merge a page that was just made."""
    while True:
        yield _merge(_page())


def _inside() -> Iterator[float]:
    """Merge every other page of an array, all alike; then of the next one."""
    twin = _page()
    words = len(twin)
    while True:
        array = memory.buffer(_ARRAY_PAGES * PAGE_SIZE)
        array.reshape(-1, words)[:] = twin
        for first in range(words, len(array), 2 * words):
            yield _merge(array[first : first + words])


def _merge(page: Words) -> float:
    start = time.perf_counter()
    report = sksm.merge(page)
    seconds = time.perf_counter() - start
    if report.merged != 1:
        raise Wrong(f"the page did not merge: {report}")
    return seconds


def _page() -> Words:
    page = memory.buffer(PAGE_SIZE)
    memory.fill(page, _SEED)
    return page
