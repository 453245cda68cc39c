"""`sksm watch` while it runs: what it says, and what all its processes cost."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil

from bench.programs.crew import running
from bench.results import Wrong
from bench.scanner.scanners import Cost, Ksmd, Scanner
from sksm.commands.demonstration import run
from sksm.daemon import runtime
from sksm.daemon.protocol import Status
from sksm.errors import DaemonUnreachable
from sksm.linux import ksm
from sksm.process import status

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37  # linux/prctl.h
_END_SECONDS = 20.0
_MARK = "SKSM_BENCH_WATCH"  # in the environment of all that the command starts


class Options(msgspec.Struct, frozen=True):
    """How to start it."""

    command: str = ""  # in place of `sksm watch`
    cpu_percent: float | None = None

    def line(self, what: Sequence[str]) -> list[str]:
        """Give the command that watches `what`."""
        own = [sys.executable, "-m", "sksm.commands.main", "watch"]
        cpu = [] if self.cpu_percent is None else ["--cpu", f"{self.cpu_percent:g}"]
        return [*(shlex.split(self.command) or own), *what, "--json", *cpu]


class Watch(Scanner):
    """The command, its children, and the sksmd that it started."""

    def __init__(self, process: subprocess.Popen[Any], mark: str, said: Path) -> None:
        self._process = process
        self._mark = mark
        self._said = said
        self.epochs: list[dict[str, Any]] = []  # what it said, once it has ended
        self._orphans: set[int] = set()  # came to us when whoever started them left
        self._ended_seconds = 0.0  # of processor time, of orphans that have ended
        self._ksmd = Ksmd()  # which it may set to work

    def cost(self) -> Cost:
        """Read what all processes have cost so far."""
        daemon = self._daemon()
        family = self._family()
        others = (one for one in family if daemon is None or one.pid != daemon.pid)
        steered = self._ksmd.cost()
        seconds = self._ended_seconds + sum(map(_cpu_seconds, family))
        memory = sum(status.pss(one.pid) for one in others)
        return Cost(seconds + steered.cpu_seconds, memory + steered.other_bytes, daemon)

    def require_alive(self) -> None:
        """Make sure that it still works.

        Raises:
            Wrong: it has ended.
        """
        if (code := self._process.poll()) is not None:
            said = self._said.with_suffix(".errors").read_text().strip()[-500:]
            raise Wrong(f"sksm watch ended with {code}: {said}")

    def end(self) -> None:
        """End what it left behind, sksmd too, and read what it said."""
        left = self._family()
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.terminate()
        psutil.wait_procs(left, _END_SECONDS)
        for line in self._said.read_bytes().splitlines():
            with contextlib.suppress(msgspec.DecodeError):  # another command's
                self.epochs.append(msgspec.json.decode(line))

    def _daemon(self) -> Status | None:
        for domain in (None, *runtime.others()):
            with contextlib.suppress(DaemonUnreachable):
                return run.status(domain)
        return None

    def _family(self) -> list[psutil.Process]:
        """List its processes; whoever ended and is ours to bury is buried."""
        found: list[psutil.Process] = []
        for child in _children(psutil.Process(), recursive=False):
            if child.pid == self._process.pid:
                found += [child, *_children(child, recursive=True)]
                continue
            with contextlib.suppress(psutil.Error):
                if child.pid not in self._orphans:
                    if child.environ().get(_MARK) != self._mark:
                        continue
                    self._orphans.add(child.pid)
                if child.status() == psutil.STATUS_ZOMBIE:
                    self._bury(child)
                else:
                    found += [child, *_children(child, recursive=True)]
        return found

    def _bury(self, child: psutil.Process) -> None:
        self._ended_seconds += _cpu_seconds(child)
        self._orphans.discard(child.pid)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child.pid, os.WNOHANG)


@contextlib.contextmanager
def watching(options: Options, *what: str) -> Iterator[Watch]:
    """Have `sksm watch` work through the block, with a daemon of its own.

    Args:
        options: how to start it.
        what: its options that say which processes to watch.
    """
    mark = secrets.token_hex(8)
    with (
        _orphans_are_ours(),
        run.own_daemon(),
        tempfile.TemporaryDirectory(prefix="sksm-watch-") as folder,
    ):
        said = Path(folder, "said")
        watch: Watch | None = None
        try:
            with said.open("wb") as out, said.with_suffix(".errors").open("wb") as err:
                process = _started(options.line(what), mark, out, err)
                with process as begun:
                    watch = Watch(begun, mark, said)
                    yield watch
            if begun.returncode == -signal.SIGKILL:
                raise Wrong("sksm watch did not end when it was told to")
        finally:
            if watch:
                watch.end()
            # If it was killed with ksmd in its hands; its notes go with the daemon.
            with contextlib.suppress(OSError):
                ksm.repair(runtime.directory() / ksm.STATE_NAME)


@contextlib.contextmanager
def _orphans_are_ours() -> Iterator[None]:
    """Have sksmd, which is nobody's child, be ours: its processor time is seen."""
    libc, before = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value)


def _started(
    command: Sequence[str], mark: str, out: IO[bytes], err: IO[bytes]
) -> contextlib.AbstractContextManager[subprocess.Popen[Any]]:
    return running(
        command,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        env={**os.environ, _MARK: mark},
    )


def _children(process: psutil.Process, *, recursive: bool) -> list[psutil.Process]:
    try:
        return process.children(recursive=recursive)
    except psutil.Error:
        return []


def _cpu_seconds(process: psutil.Process) -> float:
    """Read what a process has used, and those of its children that have ended."""
    try:
        return sum(process.cpu_times()[:4])
    except psutil.Error:
        return 0.0
