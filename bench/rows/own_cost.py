"""What sksm needs for itself: its index, its daemon."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import psutil

import sksm
from bench import daemon, memory
from bench.results import Goal, Measure, Options, Row, Wrong
from sksm.store.index import Index

_SEED = 7
_PER_PAGE = Goal(at_most=24)
_BEFORE_DATA = Goal(at_most=40 << 20)
_WORST_FROM, _WORST_TO = 1 << 17, 1 << 20  # pages, over which the index grows
_BATCH = 1 << 10


def measure(options: Options) -> Row:
    """Measure a daemon before and after `size_bytes` of different pages."""
    size = options.size_bytes
    memory.warm_up(2 * size)
    before, after, index = [], [], []
    for _ in range(min(options.rounds, 3)):
        with daemon.own() as pid:
            before.append(_private_bytes(pid))
            array = memory.buffer(size)
            memory.fill(array, _SEED)
            report = sksm.merge(array)
            if report.stored != memory.pages(array):
                raise Wrong(f"not all pages are new: {report}")
            stats = sksm.stats()
            index.append(stats.index_bytes / stats.slots)
            after.append(_private_bytes(pid))
            del array
    worst = max(_index_bytes_per_page())
    return Row(
        [
            Measure("daemon_private_bytes", "daemon before data", before, _BEFORE_DATA),
            Measure("daemon_with_data_private_bytes", "daemon with data", after),
            Measure("index_bytes_per_page", "index, per unique page", index, _PER_PAGE),
            Measure("index_worst_bytes_per_page", "  at its worst", [worst], _PER_PAGE),
        ],
        [f"the worst is that of any size from {_WORST_FROM} to {_WORST_TO} pages"],
    )


def _private_bytes(pid: int) -> float:
    """Memory that would be free without the process; the pool is not among it."""
    return float(psutil.Process(pid).memory_full_info().uss)


def _index_bytes_per_page() -> Iterator[float]:
    """Let an index grow as the daemon's does, and say what it costs on the way."""
    prints = np.random.default_rng(_SEED).integers(0, 2**64, _WORST_TO, np.uint64)
    index = Index()
    for first in range(0, _WORST_TO, _BATCH):
        batch = prints[first : first + _BATCH]
        index.insert(batch, np.arange(first, first + len(batch)))
        if first >= _WORST_FROM:
            yield index.nbytes / len(index)
