"""Memory offered before, but for every tenth page, which is like no other."""

from __future__ import annotations

import sksm
from bench import clock, daemon, floor, memory, worker
from bench.clock import Times
from bench.memory import Words
from bench.results import Goal, Measure, Options, Row, Wrong
from sksm.spans import PAGE_SIZE

_SEED = 3
_STEP = 10
_MERGED = Goal(at_least=0.9)
_MAPPINGS_PER_BYTE = 1000 / (512 << 20)


def measure(options: Options) -> Row:
    """Measure floor and ours in turns; what became of the pages is the point."""
    size = options.size_bytes
    lows, ours, shares, added = [], [], [], []
    memory.warm_up(4 * size)
    with daemon.own(), worker.holding(size, _SEED) as other:
        other.merge("stored")
        pool = floor.Pool(size, _SEED)
        for count in range(options.rounds + 1):
            low, (our, share, more) = _floor(pool, count), _ours(pool, count)
            if count:
                lows.append(low)
                ours.append(our)
                shares.append(share)
                added.append(float(more))
    most = Goal(at_most=round(_MAPPINGS_PER_BYTE * size))
    return Row(
        [
            Measure("merged_share", "pages merged", shares, _MERGED),
            Measure("mappings_added", "mappings added", added, most),
            *clock.against_floor(size, lows, ours, None),
        ],
        ["the floor copies the different pages away and back, around one mmap"],
    )


def _copy(pool: floor.Pool, count: int) -> Words:
    array = memory.buffer(pool.words.nbytes)
    array[:] = pool.words
    rows = array.reshape(-1, PAGE_SIZE // 8)[_STEP - 1 :: _STEP]
    rows[:, 0] = range(len(rows))  # like no other, in this round or another
    rows[:, 1] = count
    return array


def _floor(pool: floor.Pool, count: int) -> Times:
    return clock.timed(_copy(pool, count), lambda array: pool.cover_but(array, _STEP))


def _ours(pool: floor.Pool, count: int) -> tuple[Times, float, int]:
    array = _copy(pool, count)
    expected = array.copy()
    reports: list[sksm.MergeReport] = []
    before = memory.count_mappings()
    times = clock.timed(array, lambda array: reports.append(sksm.merge(array)))
    added = memory.count_mappings() - before
    pages = memory.pages(array)
    if reports[0].merged != pages - pages // _STEP:
        raise Wrong(f"not all of the equal pages merged: {reports[0]}")
    if not floor.equal(array, expected):
        raise Wrong("the bytes changed")
    return times, reports[0].merged / pages, added
