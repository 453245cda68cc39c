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
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from errno import EBUSY, EINVAL
from pathlib import Path

from sksm.linux import pageflags

FOLDER = Path("/sys/kernel/mm/ksm")
STATE_NAME = "ksm.json"  # in the runtime directory
MARK = "mg"  # of VmFlags in smaps: MADV_MERGEABLE

# In the order in which they are given back: pages_to_scan cannot be set while an
# advisor sets it, and ksmd runs, if it does, when all else is in place.
_KNOBS = (
    "advisor_mode",
    "advisor_max_cpu",
    "advisor_min_pages_to_scan",
    "advisor_max_pages_to_scan",
    "advisor_target_scan_time",
    "smart_scan",
    "use_zero_pages",
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
# The same, but that it can be stopped within a moment: `run` waits for so many pages.
_PAGES_A_TURN = 20_000
_AT_WORK = {**WIDE_OPEN, "use_zero_pages": "1"}
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
UNTOLD = (
    "this kernel calls every anonymous page one of KSM's (/proc/kpageflags, a bug of "
    "Linux 6.12), so nobody could tell what was merged"
)
_UNMERGE = "2"  # of `run`: takes every merged page of the machine apart


def figures() -> dict[str, int]:
    """Read what ksmd has done and how it is set; empty without CONFIG_KSM."""
    found = {}
    for name in _FIGURES:
        with contextlib.suppress(OSError):
            found[name] = int(_read(name))
    return found


def full_scans() -> int:
    """Read how often ksmd has looked at everything there is."""
    return int(_read("full_scans"))


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


@contextlib.contextmanager
def at_work(state: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Have ksmd work as fast as it can for a while; every knob is given back.

    Pages that are zeros are freed. An administrator's ksmd goes on, faster, and so
    afterwards as before.

    Args:
        state: as for `borrowed`.
        patience_s: how long to wait for another scope to end.

    Raises:
        OSError: as `borrowed`, but for EBUSY only if ksmd is told to un-merge, or
            another scope has it.
    """
    with _sole_user(state, patience_s), _ended_by_sigterm():
        _repair(state)
        _refuse_unmerging()
        before = _knobs()
        _write_down(state, before)
        try:
            pages = max(_PAGES_A_TURN, int(before["pages_to_scan"]))
            for name, value in (_AT_WORK | {"pages_to_scan": str(pages)}).items():
                if name in before:
                    tune(name, value)
            tune("run", "1")
            yield
        finally:
            _repair(state)


def obstacle() -> str | None:
    """Say why ksmd cannot be steered from here; None if it can."""
    if not FOLDER.exists():
        return "the kernel has no KSM (CONFIG_KSM)"
    if not os.access(FOLDER / "run", os.W_OK):
        return f"only root may steer ksmd ({FOLDER} is closed to you)"
    try:
        _refuse_unmerging()
    except OSError as error:
        return error.strerror
    return untold()


def untold() -> str | None:
    """Say why nobody could tell which pages KSM has merged; None if we can."""
    try:
        told = pageflags.tell_ksm()
    except OSError as error:
        return f"only root is told what KSM merged (/proc/kpageflags): {error.strerror}"
    return None if told else UNTOLD


def merged_pages(pid: int) -> int:
    """Count the pages of a process that KSM has merged, zeros included.

    Raises:
        OSError: ENOENT, ESRCH if there is no such process, or no KSM.
    """
    return merged_in(stat(pid))


def merged_in(found: dict[str, int]) -> int:
    """Count the same from what `stat` gave."""
    return found.get("ksm_merging_pages", 0) + found.get("ksm_zero_pages", 0)


def stat(pid: int) -> dict[str, int]:
    """Read /proc/PID/ksm_stat (Documentation/admin-guide/mm/ksm.rst): the numbers.

    Raises:
        OSError: as `merged_pages`; EACCES without leave to inspect the process.
    """
    found = {}
    for line in Path(f"/proc/{pid}/ksm_stat").read_text().splitlines():
        name, _, value = line.replace(":", " ").partition(" ")
        value = {"yes": "1", "no": "0"}.get(value.strip(), value.strip())
        with contextlib.suppress(ValueError):
            found[name] = int(value)
    return found


def is_marked(pid: int) -> bool:
    """Say whether KSM knows of memory of a process, or will when ksmd comes by.

    It does if some was merged, or looked at for that, or offered by MADV_MERGE.

    Raises:
        OSError: ENOENT, ESRCH if there is no such process; EACCES without leave to
            inspect it.
    """
    if not FOLDER.exists():
        return False
    found: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):  # before Linux 6.1
        found = stat(pid)
    if merged_in(found) or found.get("ksm_rmap_items") or found.get("ksm_merge_any"):
        return True
    if "ksm_mergeable" in found:  # since Linux 6.15
        return bool(found["ksm_mergeable"])
    flags = re.findall(rb"^VmFlags:.*", _smaps(pid), re.MULTILINE)
    return any(MARK.encode() in line.split() for line in flags)


def _smaps(pid: int) -> bytes:
    return Path(f"/proc/{pid}/smaps").read_bytes()


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
    _refuse_unmerging()


def _refuse_unmerging() -> None:
    if _read("run") == _UNMERGE:
        raise OSError(EBUSY, "ksmd is told to un-merge (run=2): echo 0 > .../ksm/run")


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
def _sole_user(state: Path, patience_s: float = 0.0) -> Iterator[None]:
    deadline = time.monotonic() + patience_s
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    fd = os.open(state.with_suffix(".lock"), flags, 0o600)
    try:
        while not _locked(fd):
            if time.monotonic() >= deadline:
                raise OSError(EBUSY, "another command of sksm has ksmd")
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
