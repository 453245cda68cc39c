"""Which engine merges a process: the fastest one that is safe for its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import psutil

from sksm.linux import ksm
from sksm.linux.features import Feature, missing
from sksm.process import domain, guards, runtimes

AUTO, POOL, KSM, KERNEL = "auto", "pool", "ksm", "kernel"
IN_PLACE = frozenset({KSM, KERNEL})
CROSSES = (
    "KSM knows no users, and would share its pages with process {} of another user: "
    "--engine {} does it anyway"
)


def choose(
    pid: int,
    wanted: str = AUTO,
    *,
    marked: bool = False,
    admits: Callable[[int], bool] | None = None,
) -> tuple[str, str]:
    """Choose an engine for a process.

    Args:
        pid: which.
        wanted: an engine that somebody insists on. The pool may then be used where
            freed memory may be missed (`runtimes.doubt`), and KSM across users, by
            its call or by ksmd.
        marked: rather KSM than the pool, if both are safe: its owner marked its memory
            for that.
        admits: says with which processes it may share; by default those of its domain.

    Returns:
        The engine and "", or "" and why none may be used, with what would help.

    Raises:
        OSError: as `guards.objection_to`.
    """
    if wanted != AUTO:
        reason = obstacle(wanted)
        reason = reason or guards.objection_to(pid, in_place=wanted in IN_PLACE)
        return ("", reason) if reason else (wanted, "")
    if reason := guards.objection_to(pid, in_place=True):
        return "", reason
    admits = admits or domain.of(pid).admits
    if not obstacle(KERNEL) and not stranger(admits, KERNEL):
        return KERNEL, ""
    doubt = guards.objection_to(pid) or runtimes.doubt(pid)
    if doubt or marked:
        hindrance = obstacle(KSM) or stranger(admits, KSM)
        if not hindrance:
            return KSM, ""
        if doubt:
            return "", f"{doubt}. By KSM it could be merged, but {hindrance}"
    return POOL, ""


def obstacle(engine: str) -> str | None:
    """Say why an engine cannot be used here at all; None if it can."""
    if engine == KSM:
        return ksm.obstacle()
    if engine == KERNEL:
        return missing(Feature.MADV_MERGE) or ksm.untold()
    return None


def stranger(admits: Callable[[int], bool], engine: str) -> str:
    """Find a process that an engine in place would share pages with, and may not.

    Returns:
        What is to be said of it; "" if there is none.
    """
    for pid in psutil.pids():
        with contextlib.suppress(OSError):  # it ended
            if ksm.is_marked(pid) and not admits(pid):
                return CROSSES.format(pid, engine)
    return ""
