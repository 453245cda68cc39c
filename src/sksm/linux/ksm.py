"""The in-kernel KSM: /sys/kernel/mm/ksm, Documentation/admin-guide/mm/ksm.rst.

Its knobs are the whole machine's. Whoever turns them borrows them, and they are
back as they were when the scope ends: by exception, by signal, and after SIGKILL
when the next one starts, from what the scope wrote down first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from errno import EBUSY, EINVAL
from pathlib import Path

FOLDER = Path("/sys/kernel/mm/ksm")
STATE_NAME = "ksm.json"  # in the runtime directory

# In the order in which they are given back: pages_to_scan cannot be set while an
# advisor sets it, and ksmd runs, if it does, when all else is in place.
_KNOBS = (
    "advisor_mode",
    "advisor_max_cpu",
    "advisor_min_pages_to_scan",
    "advisor_max_pages_to_scan",
    "advisor_target_scan_time",
    "smart_scan",
    "sleep_millisecs",
    "pages_to_scan",
    "run",
)
WIDE_OPEN = {
    "advisor_mode": "none",  # since 6.8
    "smart_scan": "0",  # since 6.7
    "sleep_millisecs": "0",
    "pages_to_scan": "1000000",
}
_FIGURES = (
    "run",
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "ksm_zero_pages",
    "general_profit",
    "full_scans",
    "pages_to_scan",
    "sleep_millisecs",
)
_UNMERGE = "2"  # of `run`: takes every merged page of the machine apart


def figures() -> dict[str, int]:
    """Read what ksmd has done and how it is set; empty without CONFIG_KSM."""
    found = {}
    for name in _FIGURES:
        with contextlib.suppress(OSError):
            found[name] = int(_read(name))
    return found


def cpu_seconds() -> float | None:
    """Read the processor time of ksmd; None where the thread cannot be seen."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if (entry / "comm").read_text() == "ksmd\n":
                ticks = (entry / "stat").read_text().rpartition(")")[2].split()[11:13]
                return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return None


def tune(name: str, value: str) -> None:
    """Turn one knob, inside `borrowed` only.

    Raises:
        ValueError: not a knob that is given back, or one that un-merges others'.
        OSError: as the kernel refuses.
    """
    if name not in _KNOBS or (name == "run" and value == _UNMERGE):
        raise ValueError(f"not to be written: {name} = {value}")
    (FOLDER / name).write_text(value)


def open_wide() -> None:
    """Let ksmd scan as fast as it can, as soon as it runs."""
    for name, value in WIDE_OPEN.items():
        if (FOLDER / name).exists():
            tune(name, value)


def is_wide_open() -> bool:
    """Say whether ksmd is still set as `open_wide` set it."""
    now = _knobs()
    return all(now.get(name, value) == value for name, value in WIDE_OPEN.items())


@contextlib.contextmanager
def borrowed(state: Path) -> Iterator[None]:
    """Own ksmd for a while, stopped at first; every knob is given back.

    Args:
        state: a file to write the knobs down in, in a directory only we can write
            to; always the same one, so that `repair` finds it.

    Raises:
        OSError: ENOENT without CONFIG_KSM, EACCES for all but root, EBUSY if it
            is in use: it shares somebody's pages, or another scope has it.
    """
    with _sole_user(state), _ended_by_sigterm():
        _repair(state)
        _refuse_if_used()
        _write_down(state, _knobs())
        try:
            tune("run", "0")
            yield
        finally:
            _repair(state)


def repair(state: Path) -> bool:
    """Give the knobs back that a scope left behind when it was killed.

    Returns:
        Whether there was anything to do. A scope that still runs is left alone.
    """
    if not state.exists():
        return False
    try:
        with _sole_user(state):
            return _repair(state)
    except OSError as error:
        if error.errno != EBUSY:
            raise
        return False


def _repair(state: Path) -> bool:
    try:
        saved = json.loads(state.read_text())
    except FileNotFoundError:
        return False
    with _undisturbed():
        tune("run", "0")  # while its other knobs change
        for name in _KNOBS:
            if name in saved and _read(name) != saved[name]:
                _give_back(name, str(saved[name]))
        state.unlink()
    return True


def _give_back(name: str, value: str) -> None:
    try:
        tune(name, value)
    except OSError as error:
        # EINVAL: an advisor is at work again, and pages_to_scan is its own.
        if error.errno != EINVAL or name != "pages_to_scan":
            raise


def _refuse_if_used() -> None:
    now = figures()
    run, sharing = now.get("run", 0), now.get("pages_sharing", 0)
    if run == 1 and sharing:
        raise OSError(EBUSY, f"ksmd is at work here ({sharing} pages shared)")
    if str(run) == _UNMERGE:
        raise OSError(EBUSY, "ksmd is told to un-merge (run=2)")


def _knobs() -> dict[str, str]:
    found = {}
    for name in _KNOBS:
        with contextlib.suppress(FileNotFoundError):  # older kernels have fewer
            found[name] = _read(name)
    return found


def _read(name: str) -> str:
    """Read a knob; of a choice like "[none] scan-time", the one in force."""
    text = (FOLDER / name).read_text().strip()
    if "[" in text:
        return text[text.index("[") + 1 : text.index("]")]
    return text


def _write_down(state: Path, knobs: dict[str, str]) -> None:
    """Write the file whole or not at all, and before anything is changed."""
    (FOLDER / "run").open("r+").close()  # EACCES here leaves nothing behind
    draft = state.with_suffix(".new")
    with draft.open("w") as file:
        json.dump(knobs, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(state)


@contextlib.contextmanager
def _sole_user(state: Path) -> Iterator[None]:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    fd = os.open(state.with_suffix(".lock"), flags, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(EBUSY, "another measurement has ksmd") from error
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the block as an exception does, unless somebody handles it."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep signals waiting until the block is done."""
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
