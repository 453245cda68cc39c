"""Memory of another process whose every page was offered before."""

from __future__ import annotations

import time

import numpy as np

from bench import clock, daemon, floor, memory, target
from bench.clock import Times
from bench.results import Goal, Measure, Options, Row, Skipped, Wrong
from sksm.daemon.client import RemoteStore
from sksm.engines.pool import PoolEngine
from sksm.errors import SksmError
from sksm.pipeline import merge_all
from sksm.process.other import OtherProcess
from sksm.spans import Span
from sksm.store import Store

_SEED = 9
_THREADS = (1, 16)
_SPEED = Goal(at_least=2 << 30)
_P99 = Goal(at_most=0.002)


def measure(options: Options) -> Row:
    """Measure how fast it goes, and for how long the process stands still."""
    row = Row(notes=["the floor merges memory of its own, as for a second copy"])
    size = options.size_bytes
    memory.warm_up(4 * size)
    with daemon.own():
        store = RemoteStore()
        pool = floor.Pool(size, _SEED)
        for threads in _THREADS:
            row.measures += _measure(options, store, pool, threads)
        store.close()
    return row


def _measure(
    options: Options, store: RemoteStore, pool: floor.Pool, threads: int
) -> list[Measure]:
    lows: list[Times] = []
    ours: list[float] = []
    p99: list[float] = []
    longest: list[float] = []
    with target.running(pool.words.nbytes, _SEED, threads) as process:
        span = process.buffer()
        _merge(store, process.pid, span)  # the first time it is stored
        for _ in range(options.rounds):
            array = memory.buffer(pool.words.nbytes)
            array[:] = pool.words
            lows.append(clock.timed(array, pool.cover))
            seconds, stops = _merge(store, process.pid, process.renew())
            ours.append(seconds)
            p99.append(float(np.quantile(stops, 0.99)))
            longest.append(max(stops))
        process.renew()  # and find its bytes unchanged
    name = f"threads_{threads}"
    label = f"{threads} threads" if threads > 1 else "one thread"
    ratios = [low.merge / seconds for low, seconds in zip(lows, ours, strict=True)]
    size = pool.words.nbytes
    return [
        clock.rate(f"{name}_floor", "floor", size, [low.merge for low in lows]),
        clock.rate(f"{name}_merge", f"another process, {label}", size, ours, _SPEED),
        Measure(f"{name}_merge_to_floor_ratio", "  of the floor", ratios),
        Measure(f"{name}_stopped_p99_seconds", "  stopped, 99 of 100", p99, _P99),
        Measure(f"{name}_stopped_max_seconds", "  stopped, longest", longest),
    ]


def _merge(store: Store, pid: int, span: Span) -> tuple[float, list[float]]:
    started = time.perf_counter()
    try:
        with OtherProcess(pid) as space, store.granted():
            report = merge_all(space, [span], engine=PoolEngine(store))
            stops = list(space.stops)
    except (PermissionError, SksmError) as error:
        raise Skipped(str(error)) from error
    if report.merged + report.stored != span.pages:
        raise Wrong(f"not all of {span.pages} pages merged: {report}")
    return time.perf_counter() - started, stops
