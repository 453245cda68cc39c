"""Who looks for equal pages: nobody, ksmd as it can be set, or `sksm watch`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

from bench import ksmd
from bench.results import Skipped
from sksm.daemon.protocol import Status
from sksm.linux import ksm
from sksm.spans import PAGE_SIZE

NOTHING, KSMD, ADVISOR = "nothing", "ksmd", "ksmd_advisor"
WIDE_OPEN, SKSM = "ksmd_wide_open", "sksm"
CASES = (NOTHING, KSMD, ADVISOR, WIDE_OPEN, SKSM)

# The kernel's defaults, whatever this machine is set to. In this order: an advisor
# that is at work sets pages_to_scan itself.
_DEFAULTS = {
    "advisor_mode": "none",
    "smart_scan": "1",
    "use_zero_pages": "0",
    "sleep_millisecs": "20",
    "pages_to_scan": "100",
}
# What the cases turn after that.
_BEYOND: dict[str, dict[str, str]] = {
    KSMD: {},
    ADVISOR: {
        "advisor_max_cpu": "70",
        "advisor_min_pages_to_scan": "500",
        "advisor_max_pages_to_scan": "30000",
        "advisor_target_scan_time": "200",
        "advisor_mode": "scan-time",
    },
    WIDE_OPEN: ksm.WIDE_OPEN,
}
_ITEM_FIGURES = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
_STEADY_SECONDS = 1.0
_SWEEP_SECONDS = 20.0


class Cost(NamedTuple):
    """What a scanner takes for itself."""

    cpu_seconds: float = 0.0  # since it was started
    other_bytes: int = 0  # of its memory, sksmd and its pool apart
    daemon: Status | None = None  # of sksmd, if one belongs to it


class Scanner:
    """Nobody."""

    def cost(self) -> Cost:
        """Read what it has cost so far."""
        return Cost()

    def require_alive(self) -> None:
        """Make sure that it still works.

        Raises:
            Wrong: it has ended.
        """


class Ksmd(Scanner):
    """The kernel's thread."""

    def __init__(self) -> None:
        self._before = self._now()

    def cost(self) -> Cost:
        """Read what it has cost so far."""
        now = self._now()
        return Cost(
            now.cpu_seconds - self._before.cpu_seconds,
            now.other_bytes - self._before.other_bytes,
        )

    def _now(self) -> Cost:
        """Read what there is: it keeps an item for each page that it met."""
        found = ksm.figures()
        merged = found.get("pages_sharing", 0) + found.get("ksm_zero_pages", 0)
        items = merged * PAGE_SIZE - found.get("general_profit", merged * PAGE_SIZE)
        return Cost(ksm.cpu_seconds() or 0.0, items)


@contextlib.contextmanager
def ksmd_at_work(name: str) -> Iterator[Ksmd]:
    """Have ksmd work through the block, set as the case of that name has it.

    Raises:
        Skipped: it cannot be had, or not so.
    """
    with ksmd.borrowed() as reason:
        if reason:
            raise Skipped(reason)
        for knob, value in (*_DEFAULTS.items(), *_BEYOND[name].items()):
            if (ksm.FOLDER / knob).exists():
                ksm.tune(knob, value)
            elif value == "scan-time":
                raise Skipped("this kernel's ksmd has no advisor")
        scanner = Ksmd()
        ksm.tune("run", "1")
        yield scanner


@contextlib.contextmanager
def nobody() -> Iterator[Scanner]:
    """Have nobody merge through the block: ksmd is stopped, where it can be."""
    with ksmd.borrowed():
        yield Scanner()


def sweep() -> None:
    """Have ksmd forget programs that have ended: what it keeps of them is memory."""
    with ksmd.borrowed() as reason:
        if reason:
            return
        ksm.open_wide()
        ksm.tune("run", "1")
        deadline = time.monotonic() + _SWEEP_SECONDS
        before, steady = _items(), time.monotonic() + _STEADY_SECONDS
        while before and time.monotonic() < min(steady, deadline):
            time.sleep(0.05)
            if (now := _items()) != before:
                before, steady = now, time.monotonic() + _STEADY_SECONDS


def _items() -> int:
    return sum(int((ksm.FOLDER / name).read_text()) for name in _ITEM_FIGURES)
