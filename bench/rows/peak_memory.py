"""How far memory rises while a merge is under way.

Counted are the frames that client, daemon and pool hold: anonymous memory and
page tables of both processes and the pages of the pool's file, sampled several
thousand times a second by this process, which is neither. Resident size and its
high-water mark will not do: they count a pool page in every process that maps
it, and the pool's file not at all. The machine's available memory sees all, the
kernel's own structures too; but also whatever else the machine is doing
meanwhile, and it does not see free pages that wait in a processor's own list. So
it is shown, and not held to the goal.
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench import daemon, memory, worker
from bench.results import Goal, Measure, Options, Row, Wrong
from sksm.store.pool import POOL_NAME

_SEED = 6
_RISE = Goal(at_most=100 << 20)


class Sample(NamedTuple):
    """Bytes in use at one moment."""

    held: int  # by client, daemon and pool
    used: int  # by the whole machine: what is not available


def measure(options: Options) -> Row:
    """Merge a first and then a second copy, each in a process of its own."""
    size = 2 * options.size_bytes  # 1 GiB unless told otherwise
    rises: dict[str, list[Sample]] = {"first": [], "second": []}
    memory.warm_up(3 * size)
    for _ in range(min(options.rounds, 3)):
        with (
            daemon.own() as pid,
            worker.holding(size, _SEED) as first,
            worker.holding(size, _SEED) as second,
        ):
            rises["first"].append(_rise(first, pid, "stored", size))
            rises["second"].append(_rise(second, pid, "merged", size))
    row = Row(notes=[f"while {size >> 20} MiB are merged, sampled from outside"])
    for name, found in rises.items():
        held = [float(one.held) for one in found]
        used = [float(one.used) for one in found]
        row.measures += [
            Measure(f"{name}_copy_rise_bytes", f"rise, {name} copy", held, _RISE),
            Measure(f"{name}_copy_machine_rise_bytes", "  whole machine", used),
        ]
    return row


def _rise(one: worker.Worker, daemon_pid: int, outcome: str, size: int) -> Sample:
    before = _sample([one.pid, daemon_pid], pool := _pool_of(daemon_pid))
    one.ask()
    samples = list(_samples_until_answer(one, daemon_pid, pool))
    report = one.answer()
    if report[outcome] * os.sysconf("SC_PAGESIZE") != size:
        raise Wrong(f"not all pages were {outcome}: {report}")
    return Sample(
        max(sample.held for sample in samples) - before.held,
        max(sample.used for sample in samples) - before.used,
    )


def _samples_until_answer(
    one: worker.Worker, daemon_pid: int, pool: Path
) -> Iterator[Sample]:
    while True:
        yield _sample([one.pid, daemon_pid], pool)
        if select.select([one.output], [], [], 0)[0]:
            return


def _sample(pids: list[int], pool: Path) -> Sample:
    held = pool.stat().st_blocks * 512
    for pid in pids:
        status = _kib(Path(f"/proc/{pid}/status"))
        held += (status["RssAnon"] + status["VmPTE"]) * 1024
    machine = _kib(Path("/proc/meminfo"))
    return Sample(held, (machine["MemTotal"] - machine["MemAvailable"]) * 1024)


def _kib(table: Path) -> dict[str, int]:
    lines = [line.split() for line in table.read_text().splitlines()]
    return {line[0][:-1]: int(line[1]) for line in lines if line[-1] == "kB"}


def _pool_of(pid: int) -> Path:
    """Find the daemon's descriptor of its pool."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(entry).startswith(f"/memfd:{POOL_NAME}"):
            return entry
    raise Wrong("the daemon holds no pool")
