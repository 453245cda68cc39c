"""Merging what is merged: one scan of the page table, and nothing else."""

from __future__ import annotations

import os
import time

import sksm
from bench import clock, daemon, memory
from bench.memory import Words
from bench.results import Measure, Options, Row, Wrong
from sksm.linux import pagemap
from sksm.linux.pagemap import Category
from sksm.spans import Span

_SEED = 5


def measure(options: Options) -> Row:
    """Measure the scan alone and the call in turns."""
    size = options.size_bytes
    memory.warm_up(3 * size)
    lows, ours = [], []
    with daemon.own():
        array = memory.buffer(size)
        memory.fill(array, _SEED)
        sksm.merge(array)
        array.sum()
        for count in range(options.rounds + 1):
            low, our = _scan(array), _merge(array)
            if count:
                lows.append(low)
                ours.append(our)
    ratios = [low / our for low, our in zip(lows, ours, strict=True)]
    return Row(
        [
            clock.rate("floor", "floor, PAGEMAP_SCAN", size, lows),
            clock.rate("merge", "sksm.merge", size, ours),
            Measure("merge_to_floor_ratio", "  of the floor", ratios),
            Measure("merge_seconds", "the call", ours),
        ]
    )


def _scan(array: Words) -> float:
    span = Span(array.ctypes.data, array.ctypes.data + array.nbytes)
    some = Category.PRESENT | Category.SWAPPED
    told = some | Category.FILE | Category.PFNZERO
    table = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        start = time.perf_counter()
        _, at = pagemap.scan(table, span, any_of=some, returned=told)
        seconds = time.perf_counter() - start
    finally:
        os.close(table)
    if at != span.stop:
        raise Wrong("merged memory is not one run of pages")
    return seconds


def _merge(array: Words) -> float:
    before = memory.count_mappings()
    start = time.perf_counter()
    report = sksm.merge(array)
    seconds = time.perf_counter() - start
    if report.already != memory.pages(array) or memory.count_mappings() != before:
        raise Wrong(f"merging merged memory was not idle: {report}")
    return seconds
