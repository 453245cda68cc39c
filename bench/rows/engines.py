"""What each engine saves of two processes' memory, and the processor time it takes.

Half of each process's memory equals the other's. Beside the engines: ksmd over all of
their memory, wide open until it has merged as much, and with its defaults for a while.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import psutil

from bench import daemon, ksmd, memory, target
from bench.results import Goal, Measure, Options, Row, Wrong
from sksm import others
from sksm.commands.demonstration import figures, run
from sksm.engines import choice
from sksm.gain import RMAP_ITEM_BYTES
from sksm.linux import ksm, libc
from sksm.process import domain
from sksm.process.other import OtherProcess
from sksm.spans import PAGE_SIZE

_SEED = 3
_DEFAULT_SECONDS = 20.0  # that ksmd gets with its defaults
_PATIENCE_SECONDS = 120.0
_ALL = 0.99  # of the duplicates
_OF_KSMD = Goal(at_least=1.0)
_SAVED = Goal(at_least=0.95)


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What one way of merging took and brought."""

    seconds: float
    cpu_seconds: float
    saved_bytes: int  # net, by the kernel's count


def measure(options: Options) -> Row:
    """Measure the ways in turns, each on new processes."""
    row = Row()
    if reason := ksm.obstacle():
        row.skipped = f"ksmd cannot be steered: {reason}"
        return row
    memory.warm_up(4 * options.size_bytes)
    ways: dict[str, Callable[[list[int], int], Work]] = {
        choice.POOL: _by_pool,
        choice.KSM: _by_ksm,
        "ksmd_wide_open": _by_ksmd_wide_open,
        "ksmd_defaults": _by_ksmd_defaults,
    }
    found: dict[str, list[Work]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            with _processes(options.size_bytes) as pids:
                found[name].append(way(pids, options.size_bytes))
    peers = [work.cpu_seconds for work in found["ksmd_wide_open"]]
    for name, works in found.items():
        row.measures += _measures(name, works, options.size_bytes, peers)
    return row


def _measures(
    name: str, works: list[Work], size: int, peers: list[float]
) -> list[Measure]:
    ours = name in (choice.POOL, choice.KSM)
    label = name.replace("_", " ")
    shares = [work.saved_bytes / size for work in works]
    rates = [work.saved_bytes / max(work.cpu_seconds, 0.01) for work in works]
    measures = [
        Measure(f"{name}_saved_share", label, shares, _SAVED if ours else None),
        Measure(f"{name}_seconds", "  time", [work.seconds for work in works]),
        Measure(f"{name}_cpu_seconds", "  CPU", [work.cpu_seconds for work in works]),
        Measure(f"{name}_saved_bytes_per_second", "  saved by CPU second", rates),
    ]
    if ours:
        pairs = zip(peers, works, strict=True)
        ratios = [peer / max(work.cpu_seconds, 0.01) for peer, work in pairs]
        what = "  CPU of ksmd wide open, to its"
        measures.append(Measure(f"{name}_cpu_ratio", what, ratios, _OF_KSMD))
    return measures


@contextlib.contextmanager
def _processes(size: int) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        held = [
            stack.enter_context(target.running(size, _SEED, 1, size)) for _ in range(2)
        ]
        for one in held:
            one.buffer()
        yield [one.pid for one in held]
        for one in held:
            one.renew()  # and find its bytes unchanged


def _by_pool(pids: list[int], size: int) -> Work:
    with daemon.own() as keeper:
        return _merged(pids, choice.POOL, lambda: _cpu_of(keeper))


def _by_ksm(pids: list[int], size: int) -> Work:
    return _merged(pids, choice.KSM, lambda: ksm.cpu_seconds() or 0.0)


def _merged(pids: list[int], engine: str, helper: Callable[[], float]) -> Work:
    """Merge as `sksm merge` does, without watching: nobody writes."""
    wishes = others.Wishes(watch_seconds=0, engine=engine)
    before = _total(pids, engine)
    started, used = time.perf_counter(), time.process_time() + helper()
    outcomes = others.merge(pids, wishes, lambda *_: lambda _: None)
    seconds = time.perf_counter() - started
    cpu = time.process_time() + helper() - used
    if failed := [one for one in outcomes if one.failed]:
        raise Wrong(f"{engine}: {failed[0].refusal or failed[0].error}")
    return Work(seconds, cpu, before - _total(pids, engine))


def _by_ksmd_wide_open(pids: list[int], size: int) -> Work:
    return _by_ksmd(pids, size, _PATIENCE_SECONDS, ksm.open_wide)


def _by_ksmd_defaults(pids: list[int], size: int) -> Work:
    return _by_ksmd(pids, size, _DEFAULT_SECONDS, lambda: None)


def _by_ksmd(
    pids: list[int], size: int, seconds: float, tune: Callable[[], None]
) -> Work:
    """Have ksmd look at all memory of the processes, as PR_SET_MEMORY_MERGE does."""
    with ksmd.borrowed() as without:
        if without:
            raise Wrong(f"ksmd: {without}")
        before = _total(pids, choice.KSM)
        for pid in pids:
            _mark(pid)
        tune()
        started, used = time.perf_counter(), ksm.cpu_seconds() or 0.0
        ksm.tune("run", "1")
        wanted = _ALL * 2 * size / PAGE_SIZE
        while time.perf_counter() - started < seconds:
            if sum(map(ksm.merged_pages, pids)) >= wanted:
                break
            time.sleep(0.005)
        work = time.perf_counter() - started, (ksm.cpu_seconds() or 0.0) - used
        ksm.tune("run", "0")
        return Work(*work, before - _total(pids, choice.KSM))


def _mark(pid: int) -> None:
    with OtherProcess(pid) as space:
        spans = [
            mapping.span
            for mapping in space.mappings()
            if not mapping.shared and not mapping.special
        ]
        space.advise(spans, libc.MADV_MERGEABLE)


def _cpu_of(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _total(pids: list[int], engine: str) -> int:
    """Sum up all that the processes take, and the engine for them."""
    if engine == choice.POOL:
        return figures.take(pids, run.status(domain.of(pids[0]))).total_bytes
    items = sum(ksm.stat(pid)["ksm_rmap_items"] for pid in pids)
    return figures.take(pids, None).total_bytes + items * RMAP_ITEM_BYTES
