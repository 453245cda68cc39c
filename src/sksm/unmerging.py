"""What an operator does to undo a merge of running programs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

import psutil

from sksm.engines import frames
from sksm.errors import SksmError
from sksm.linux import ksm, libc, maps
from sksm.linux.maps import Mapping
from sksm.outcomes import Outcome, failures_of
from sksm.pages import BATCH_PAGES, is_pool
from sksm.process import DONE, EXCHANGE_PAGES, guards, permission, status
from sksm.process.other import EVERYTHING, OtherProcess
from sksm.report import Step
from sksm.spans import PAGE_SIZE, groups


def unmerge(pids: Sequence[int], step: Step) -> list[Outcome]:
    """Give processes private memory again in the place of what they share.

    Raises:
        SksmError: there is not enough memory, and nothing was done.
    """
    outcomes = [Outcome(pid, status.name(pid)) for pid in pids]
    shared: dict[int, list[Mapping]] = {}
    wanted = 0
    for outcome in outcomes:
        with failures_of(outcome):
            permission.require_memory(outcome.pid)
            found = maps.mappings(outcome.pid, EVERYTHING)  # with flags: to be kept
            by_ksm = _merged_by_ksm(outcome.pid)
            shared[outcome.pid] = [
                mapping
                for mapping in found
                if is_pool(mapping) or (by_ksm and ksm.MARK in mapping.flags)
            ]
            wanted += by_ksm + sum(m.span.size for m in found if is_pool(m))
    available = psutil.virtual_memory().available
    if wanted > available:
        raise SksmError(
            f"un-merging needs {wanted} bytes of memory, and only {available} are "
            "available: end something, or name fewer processes"
        )
    for outcome in outcomes:
        if mappings := shared.get(outcome.pid):
            tell = step(
                f"un-merging {outcome.pid}", sum(m.span.pages for m in mappings)
            )
            outcome.pss_before = status.pss(outcome.pid)
            with failures_of(outcome):
                _privatise(outcome, mappings, tell)
            outcome.pss_after = status.pss(outcome.pid)
    return outcomes


def _privatise(
    outcome: Outcome, mappings: list[Mapping], tell: Callable[[float], None]
) -> None:
    by_pool = any(is_pool(mapping) for mapping in mappings)
    if reason := guards.objection_to(outcome.pid, in_place=not by_pool):
        outcome.refusal = reason
        return
    with OtherProcess(outcome.pid) as space:
        try:
            for mapping in mappings:
                if is_pool(mapping):
                    _replace(outcome, space, mapping, tell)
                else:
                    _unmark(outcome, space, mapping, tell)
        finally:
            outcome.stops = list(space.stops)


def _replace(
    outcome: Outcome,
    space: OtherProcess,
    mapping: Mapping,
    tell: Callable[[float], None],
) -> None:
    for (piece,) in groups([mapping.span], EXCHANGE_PAGES):
        space.privatise(piece, mapping.prot, not_forked="dc" in mapping.flags)
        outcome.unmerged_bytes += piece.size
        tell(piece.pages)


def _unmark(
    outcome: Outcome,
    space: OtherProcess,
    mapping: Mapping,
    tell: Callable[[float], None],
) -> None:
    """Have the kernel copy what KSM has merged, and mark it no longer.

    Raises:
        OSError: ENOMEM, EBUSY, with what was not done yet as it was.
    """
    for (piece,) in groups([mapping.span], BATCH_PAGES):
        before = frames.merged_bytes(space, piece)
        (verdict,) = space.advise([piece], libc.MADV_UNMERGEABLE)
        if verdict != DONE:
            raise OSError(verdict, f"un-merging {piece}: {os.strerror(verdict)}")
        outcome.unmerged_bytes += before
        tell(piece.pages)


def _merged_by_ksm(pid: int) -> int:
    """Say how many bytes of a process KSM has merged; 0 where nobody knows."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        return ksm.merged_pages(pid) * PAGE_SIZE
    return 0
