"""The demonstration, step by step."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from sksm.commands.demonstration import figures, ksmd, proofs
from sksm.commands.demonstration.crew import Hand, ask_all, crew
from sksm.commands.demonstration.figures import Snapshot
from sksm.commands.demonstration.proofs import Proof
from sksm.daemon import runtime
from sksm.daemon.client import RemoteStore
from sksm.daemon.protocol import Status
from sksm.errors import DaemonUnreachable, SksmError
from sksm.linux import ksm
from sksm.process.domain import Domain
from sksm.spans import PAGE_SIZE

_RELEASE_SECONDS = 20.0


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to demonstrate."""

    path: Path
    workers: int
    private_bytes: int
    with_ksmd: bool

    @property
    def steps(self) -> int:
        """How often `run` tells what it is doing."""
        return self.workers + 6


@dataclasses.dataclass(frozen=True, slots=True)
class Merge:
    """One worker's call, as its report has it; `seconds` are the caller's."""

    pid: int
    merged_bytes: int
    stored_bytes: int
    left_bytes: int  # neither: no twin, or refused
    seconds: float
    bytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Result:
    """All that came out."""

    data: str
    data_bytes: int  # in each worker
    arrays: int
    private_bytes: int
    before: Snapshot
    after: Snapshot
    merges: list[Merge]
    proofs: list[Proof]
    ksmd: ksmd.Cost

    @property
    def saved_bytes(self) -> int:
        """Memory saved, less all that sksm takes. May be negative."""
        return self.before.total_bytes - self.after.total_bytes

    @property
    def holds(self) -> bool:
        """Whether everything was proved."""
        return all(proof.holds for proof in self.proofs)


def run(plan: Plan, tell: Callable[[str], None]) -> Result:
    """Do it all, in a daemon of its own, and leave nothing behind.

    Args:
        plan: what to do.
        tell: told what comes next, for a progress bar.

    Raises:
        SksmError: it could not be done.
    """
    state = runtime.directory() / ksm.STATE_NAME
    with own_daemon():
        with crew(plan.workers, plan.path, plan.private_bytes) as hands:
            found = _with_workers(plan, hands, tell)
        tell("workers gone, waiting for the pool to go")
        released = _release()
    tell("measuring ksmd on a sample")
    size: int = found["data_bytes"]
    cost = ksmd.estimate(plan.path, size, plan.workers, state, measure=plan.with_ksmd)
    found["proofs"].append(released)
    return Result(**found, ksmd=cost)


def _with_workers(
    plan: Plan, hands: list[Hand], tell: Callable[[str], None]
) -> dict[str, Any]:
    pids = [hand.pid for hand in hands]
    tell("workers load the data")
    loaded = ask_all(hands, "load")
    tell("checksums of every byte")
    sums = ask_all(hands, "checksum")
    before = figures.take(pids, None)
    merges = []
    for number, hand in enumerate(hands, 1):
        tell(f"worker {number} of {len(hands)} merges")
        merges.append(_merge(hand))
    tell("checksums again")
    again = ask_all(hands, "checksum")
    daemon = status()
    after = figures.take(pids, daemon)
    size = loaded[0]["data_bytes"]
    tell("one worker writes one byte")
    return {
        "data": plan.path.name,
        "data_bytes": size,
        "arrays": loaded[0]["arrays"],
        "private_bytes": plan.private_bytes,
        "before": before,
        "after": after,
        "merges": merges,
        "proofs": [
            proofs.intact(plan.path, size, sums, again),
            proofs.saved(hands, size, before, after),
            proofs.writing(hands, size // PAGE_SIZE),
        ],
    }


def _merge(hand: Hand) -> Merge:
    report = hand.ask("merge")
    merged = report["merged"] + report["zero"] + report["already"]
    done = merged + report["stored"]
    return Merge(
        pid=hand.pid,
        merged_bytes=merged * PAGE_SIZE,
        stored_bytes=report["stored"] * PAGE_SIZE,
        left_bytes=(report["scanned"] - done) * PAGE_SIZE,
        seconds=report["seconds"],
        bytes_per_second=report["scanned"] * PAGE_SIZE / report["seconds"],
    )


def status(domain: Domain | None = None, *, reclaim: bool = False) -> Status:
    """Ask a daemon how things stand: this user's, if not that of another domain.

    Raises:
        DaemonUnreachable: it is not there.
    """
    with contextlib.closing(RemoteStore(domain, start=False)) as store:
        return store.status(reclaim=reclaim)


def _release() -> Proof:
    """Wait until the daemon has given back every page of the pool."""
    claim = "the pool goes with the workers"
    start = time.monotonic()
    while (now := status(reclaim=True)).pool_bytes:
        if time.monotonic() - start > _RELEASE_SECONDS:
            left = f"{now.pool_bytes} bytes are left"
            return Proof(claim, False, left)
        time.sleep(0.05)
    seconds = time.monotonic() - start
    return Proof(claim, True, f"0 pages left, {seconds:.2f} s after they ended")


@contextlib.contextmanager
def own_daemon() -> Iterator[None]:
    """Use daemons that nobody else uses, so that every figure is of the block."""
    folder = tempfile.mkdtemp(prefix="demo-", dir=runtime.directory())
    with contextlib.ExitStack() as undo:  # a signal in one step spares no other
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        undo.callback(_set_override, os.environ.get(runtime.OVERRIDE))
        undo.callback(_end_daemons)
        _set_override(folder)
        yield


def _set_override(folder: str | None) -> None:
    if folder is None:
        os.environ.pop(runtime.OVERRIDE, None)
    else:
        os.environ[runtime.OVERRIDE] = folder


def _end_daemons() -> None:
    for domain in (None, *runtime.others()):
        with contextlib.suppress(DaemonUnreachable, SksmError, psutil.Error, OSError):
            process = psutil.Process(status(domain).pid)
            process.terminate()
            process.wait(10)
