"""A case of the experiment: many processes, and what the kernel says of memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from bench.results import Wrong
from sksm.commands.demonstration import figures
from sksm.daemon import runtime
from sksm.linux import ksm
from sksm.process import status

PLAIN, PATCHED, MERGED = "plain", "patched", "merged"
KSMD, KSM = "ksmd_wide_open", "ksm"
CASES = (PLAIN, PATCHED, MERGED, KSMD, KSM)
_SOURCE = Path(__file__).with_name("patch.c")
_RUN = [sys.executable, "-m", "sksm.commands.main", "run"]
# So many in the background. The shell and sksm are not preloaded: only `sleep` is.
_MANY = (
    "i=0; while [ $i -lt $COUNT ]; "
    'do LD_PRELOAD="$LIBRARY" sleep 5000 & i=$((i+1)); done; wait'
)
_LOOK_SECONDS = 0.5
_KSMD_SECONDS = 60.0  # that ksmd gets, at most
_STEADY_LOOKS = 10  # without a change: ksmd has merged what there is


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """Memory in use some time after the start."""

    seconds: float
    anonymous_pages: int  # nr_anon_pages, as the proposal counted
    honest_bytes: int  # anonymous, shared, page tables, slab: our processes included


@dataclasses.dataclass(slots=True)
class Case:
    """All that was seen of one case, less what there was before."""

    name: str
    looks: list[Look]
    seconds: float = 0.0  # until all processes were ready
    cpu_seconds: float = 0.0  # of ksmd

    @property
    def last(self) -> Look:
        """How it ended."""
        return self.looks[-1]


def compiled(folder: Path) -> Path:
    """Compile the library that is preloaded.

    Raises:
        Wrong: there is no compiler.
    """
    library = folder / "patch.so"
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", library, _SOURCE]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Wrong(f"cannot compile {_SOURCE.name}: {error}") from error
    return library


def measure(name: str, library: Path, count: int, tell: Callable[[str], None]) -> Case:
    """Start `count` processes of a case, and look at memory until it is steady."""
    base = _look(0.0)
    case = Case(name, [])
    with _started(name, library, count) as ready:
        started = time.monotonic()

        def look() -> None:
            now = _look(time.monotonic() - started)
            pages = now.anonymous_pages - base.anonymous_pages
            honest = now.honest_bytes - base.honest_bytes
            case.looks.append(Look(now.seconds, pages, honest))
            tell(f"{name}: {len(case.looks)} looks, {honest >> 20} MiB")

        while not ready():
            look()
            time.sleep(_LOOK_SECONDS)
        case.seconds = time.monotonic() - started
        if name in (KSMD, KSM):
            case.cpu_seconds = _let_ksmd_work(name, look)
        for _ in range(4):
            time.sleep(_LOOK_SECONDS)
            look()
    return case


@contextlib.contextmanager
def _started(name: str, library: Path, count: int) -> Iterator[Callable[[], bool]]:
    """Start the processes; gives what says whether all are ready."""
    fifo = library.with_name("told")
    with contextlib.suppress(FileExistsError):
        os.mkfifo(fifo)
    told = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    fields = {**os.environ, "COUNT": str(count), "LIBRARY": str(library)}
    fields["TOLD"] = str(fifo)
    if name != PLAIN:
        fields["PATCH"] = "merge" if name == MERGED else "patch"
    before = {MERGED: [*_RUN, "--"], KSMD: [*_RUN, "--ksm", "--"]}
    before[KSM] = before[KSMD]
    command = [*before.get(name, []), "sh", "-c", _MANY]
    process = subprocess.Popen(
        command, env=fields, start_new_session=True, stderr=subprocess.DEVNULL
    )
    seen = 0

    def ready() -> bool:
        nonlocal seen
        with contextlib.suppress(BlockingIOError):
            said = os.read(told, count)
            if b"!" in said:
                raise Wrong("MADV_MERGE failed")
            seen += len(said)
        if process.poll() is not None:
            raise Wrong(f"the processes ended: {process.returncode}")
        return seen >= count

    try:
        yield ready
    finally:
        os.close(told)
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End all that was started, and wait until its memory is given back."""
    everyone = [one for one in psutil.process_iter() if _session(one) == process.pid]
    for one in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            if one.name() == "sleep":
                one.send_signal(signal.SIGTERM)
    process.wait(60)
    psutil.wait_procs(everyone, timeout=60)


def _session(one: psutil.Process) -> int:
    try:
        return os.getsid(one.pid)
    except ProcessLookupError:
        return 0


def _let_ksmd_work(name: str, look: Callable[[], None]) -> float:
    """Let ksmd work until it has no effect any more; gives its processor time."""
    state = runtime.directory() / ksm.STATE_NAME
    used = ksm.cpu_seconds() or 0.0
    with ksm.borrowed(state):
        if name == KSMD:
            ksm.open_wide()
        ksm.tune("run", "1")
        deadline = time.monotonic() + _KSMD_SECONDS
        sharing, same = -1, 0
        while time.monotonic() < deadline and same < _STEADY_LOOKS:
            time.sleep(_LOOK_SECONDS)
            look()
            now = ksm.figures()["pages_sharing"]
            same = same + 1 if now == sharing and now else 0
            sharing = now
        ksm.tune("run", "0")
    return (ksm.cpu_seconds() or 0.0) - used


def _look(seconds: float) -> Look:
    machine = status.sizes("/proc/meminfo")
    anonymous = machine["AnonPages"] // os.sysconf("SC_PAGE_SIZE")
    return Look(seconds, anonymous, figures.take((), None).machine_used_bytes)
