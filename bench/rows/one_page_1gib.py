"""One page a call, where the process holds much else."""

from __future__ import annotations

from bench import memory
from bench.results import Options, Row
from bench.rows import one_page

_HELD_BYTES = 1 << 30


def measure(options: Options) -> Row:
    """Measure beside 1 GiB that has nothing to do with it."""
    memory.warm_up(2 * _HELD_BYTES)
    return one_page.measure_beside(options, _HELD_BYTES)
