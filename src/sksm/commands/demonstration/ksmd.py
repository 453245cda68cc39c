"""What the kernel's own scanner would have needed: measured if root, on a sample."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from errno import EBUSY
from pathlib import Path

from sksm.commands.demonstration.crew import crew
from sksm.linux import ksm
from sksm.spans import PAGE_SIZE

_SAMPLE_BYTES = 64 << 20
_PATIENCE_SECONDS = 20.0
_ENOUGH = 0.99  # of the sample
_SCANS = 2  # a page is merged in the second scan that finds it unchanged


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """Time for the same saving; None where it could not be measured.

    The first three are the sample's, as measured. With the other two it is scaled
    by `factor` to all of the data.
    """

    sample_bytes: int = 0
    sample_seconds: float | None = None
    sample_cpu_seconds: float | None = None
    factor: float = 0.0
    seconds: float | None = None  # every knob open
    cpu_seconds: float | None = None
    as_set_seconds: float | None = None  # at best, with the knobs as they are
    why_not: str = ""


def estimate(path: Path, size: int, workers: int, state: Path, measure: bool) -> Cost:
    """Say what ksmd would have needed to save `workers - 1` copies of the data.

    Args:
        path: the data, of which the head is the sample.
        size: bytes of it in each worker.
        workers: how many copies there are.
        state: where ksmd's knobs are written down while they are borrowed.
        measure: whether to turn them, if root, at all.
    """
    as_set = _as_set(size * workers)
    if not measure:
        return Cost(as_set_seconds=as_set, why_not="not asked for (--no-ksmd)")
    if os.geteuid() != 0:
        return Cost(as_set_seconds=as_set, why_not="only root can measure it")
    sample = min(_SAMPLE_BYTES, path.stat().st_size) // PAGE_SIZE * PAGE_SIZE
    try:
        with ksm.borrowed(state):
            seconds, cpu = _measure(path, sample)
    except (OSError, TimeoutError) as error:
        reason = error.strerror or str(error)
        return Cost(as_set_seconds=as_set, why_not=reason)
    factor = size * (workers - 1) / sample
    return Cost(
        sample_bytes=sample,
        sample_seconds=seconds,
        sample_cpu_seconds=cpu,
        factor=factor,
        seconds=seconds * factor,
        cpu_seconds=None if cpu is None else cpu * factor,
        as_set_seconds=as_set,
    )


def _as_set(nbytes: int) -> float | None:
    """Compute the least time from the knobs: pages_to_scan every sleep_millisecs."""
    now = ksm.figures()
    pages, sleep = now.get("pages_to_scan", 0), now.get("sleep_millisecs", 0)
    if not pages or not sleep:
        return None
    return _SCANS * nbytes / PAGE_SIZE / pages * sleep / 1000


def _measure(path: Path, sample: int) -> tuple[float, float | None]:
    """Have ksmd merge two copies of the sample; gives time and processor time."""
    ksm.open_wide()
    base = _sharing()
    with crew(1, path, PAGE_SIZE) as hands:
        hands[0].ask("ksm", sample)
        cpu = ksm.cpu_seconds()
        start = time.perf_counter()
        ksm.tune("run", "1")
        enough = 2 * _ENOUGH * sample / PAGE_SIZE
        _wait(lambda: ksm.merged_pages(hands[0].pid) >= enough)
        seconds = time.perf_counter() - start
        used = ksm.cpu_seconds()
        if not ksm.is_wide_open():
            raise OSError(EBUSY, "somebody else turned ksmd's knobs meanwhile")
    _wait(lambda: _sharing() <= base)  # ksmd forgets in a scan, or not at all
    return seconds, None if cpu is None or used is None else used - cpu


def _sharing() -> int:
    return ksm.figures().get("pages_sharing", 0)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"ksmd was not done after {_PATIENCE_SECONDS:.0f} s")
        time.sleep(0.002)
