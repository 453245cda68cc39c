"""The net gain of each engine."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sksm.estimate import Figures
from sksm.gain import KERNEL, KSM, POOL, gains
from sksm.spans import PAGE_SIZE

pytestmark = [pytest.mark.check, pytest.mark.pure]

COUNTS = st.integers(0, 1 << 30)


def of(figures, vma_bytes=200):
    return {gain.engine: gain for gain in gains(figures, vma_bytes)}


def test_costs_are_those_of_the_sources():
    """Two mappings a run and 20 bytes a page kept; 64 bytes a page scanned."""
    figures = Figures(
        duplicate_bytes=70 * PAGE_SIZE,
        zero_bytes=30 * PAGE_SIZE,
        kept_bytes=10 * PAGE_SIZE,
        span_pages=120,
        mappings=3,
    )
    found = of(figures)
    freed = 100 * PAGE_SIZE
    assert {gain.freed_bytes for gain in found.values()} == {freed}
    assert found[POOL].net_bytes == freed - 3 * 2 * 200 - 10 * 20
    assert found[KSM].net_bytes == freed - 120 * 64
    assert found[KERNEL].net_bytes == freed


def test_many_small_runs_can_cost_more_than_they_bring():
    """A loss is told as one."""
    scattered = Figures(zero_bytes=PAGE_SIZE, mappings=11, span_pages=65)
    assert of(scattered)[POOL].net_bytes < 0
    assert of(scattered)[KSM].net_bytes < 0


@settings(deadline=None)
@given(COUNTS, COUNTS, COUNTS, st.integers(0, 1000))
def test_no_engine_gains_more_than_the_kernel_would(freed, mappings, pages, vma):
    """Which is what is held twice."""
    figures = Figures(duplicate_bytes=freed, mappings=mappings, span_pages=pages)
    assert max(gain.net_bytes for gain in gains(figures, vma)) == freed
