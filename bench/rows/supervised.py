"""MADV_MERGE under `sksm run`: one call, and what any other advice pays for it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import numpy as np

from bench import daemon
from bench.results import Measure, Options, Row, Wrong
from sksm.linux.features import Feature, missing

_CALLS = 20  # a round
_LARGE_MIB = 2048
_CALLED = (  # pages of a call; and what the program has besides
    ("pages_1", "one page", 1, 0),
    ("pages_1_large", "one page beside 2 GiB", 1, _LARGE_MIB),
    ("pages_400", "400 pages", 400, 0),  # about libc's code
)
_RUN = [sys.executable, "-m", "sksm.commands.main", "run", "--"]


def measure(options: Options) -> Row:
    """Time calls of 1 and of 400 pages, and ordinary ones with and without."""
    row = Row()
    if reason := missing(Feature.SECCOMP_USER_NOTIF):
        row.skipped = reason
        return row
    with daemon.own():
        for name, label, pages, mib in _CALLED:
            rounds = [_called(pages, mib)["merges"] for _ in range(options.rounds)]
            medians = [statistics.median(calls) for calls in rounds]
            p99 = [float(np.quantile(calls, 0.99)) for calls in rounds]
            row.measures += [
                Measure(f"{name}_median_seconds", f"{label}, median", medians),
                Measure(f"{name}_p99_seconds", "  p99", p99),
            ]
        bare, under = [], []
        for _ in range(options.rounds):
            bare.append(statistics.median(_called(0, 0, supervised=False)["ordinary"]))
            under.append(statistics.median(_called(0, 0)["ordinary"]))
    ratios = [one / other for one, other in zip(under, bare, strict=True)]
    row.measures += [
        Measure("bare_median_seconds", "another advice, bare", bare),
        Measure("under_median_seconds", "  under sksm run", under),
        Measure("under_to_bare_ratio", "  of bare", ratios),
    ]
    return row


def _called(pages: int, mib: int, *, supervised: bool = True) -> dict[str, list[float]]:
    words = map(str, (_CALLS, pages, mib))
    command = [sys.executable, "-m", "bench.caller", *words]
    done = subprocess.run(
        [*(_RUN if supervised else []), *command], capture_output=True, text=True
    )
    if done.returncode:
        raise Wrong(f"bench.caller: {done.stderr.strip()}")
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found
