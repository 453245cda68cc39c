"""The flags of a mapping, found by effect instead of by smaps.

The kernel tells `VmFlags` only in /proc/PID/smaps, and writing that walks the
page tables of every mapping before: 28 ms per GiB of small pages, for the sake of
a call on one page. But for each flag that matters there is a call that would do
nothing to a mapping without it. Such calls take 1 us.
"""

from __future__ import annotations

import dataclasses
from errno import EBUSY, EFAULT, EINVAL, ENOMEM, ENOTTY, EPERM
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sksm.linux import calls, libc, maps
from sksm.linux.maps import Mapping
from sksm.spans import PAGE_SIZE, Span

# Clearing a flag (mm/madvise.c) leaves a mapping alone that does not have it, and
# splits one that has it, around the page it is cleared for.
_CLEARED = {
    "dc": (libc.MADV_DOFORK, libc.MADV_DONTFORK),
    "wf": (libc.MADV_KEEPONFORK, libc.MADV_WIPEONFORK),
    "dd": (libc.MADV_DODUMP, libc.MADV_DONTDUMP),
}
_OURS = "/memfd:sksm-"
# No mapping grows to that (mm/mremap.c): ENOMEM. But first the kernel looks whether the
# two pages that are to grow are of one mapping: EFAULT.
_TOO_LONG = (1 << 47) - PAGE_SIZE


def query(table: int, span: Span) -> list[Mapping] | None:
    """List the mappings that meet `span`, without flags; None before Linux 6.11.

    Args:
        table: an open /proc/PID/maps.
        span: where to look.
    """
    try:
        return list(maps.query(table, span))
    except OSError as error:
        if error.errno != ENOTTY:
            raise
        return None


def with_flags(
    found: list[Mapping], span: Span, home: calls.Home
) -> list[Mapping] | None:
    """Add those flags that forbid a merge to mappings, but for shadow stacks.

    In microseconds. Every trial ends as it began: what clears a flag sets it again, in
    the same list of calls. For the time between, a child that another thread forks has
    one page too many, or with contents.

    Of a mapping of one page, the flags that are found by a split are not told: see
    `too_small`.

    Args:
        found: as `query` gives it.
        span: where to try, among them.
        home: that process.

    Returns:
        None if only smaps can tell.
    """
    script = calls.CallList(home)
    trials = [
        None if _is_known(mapping) else _Trial(script, mapping, mapping.span & span)
        for mapping in found
    ]
    results = script.run().results if len(script) else np.empty(0, np.int64)
    told = []
    for mapping, trial in zip(found, trials, strict=True):
        flags = trial.read(results) if trial else _by_name(mapping)
        if flags is None:
            return None
        told.append(dataclasses.replace(mapping, flags=mapping.flags | flags))
    return told


def too_small(found: list[Mapping]) -> bool:
    """Say whether there is one that no trial splits, and whose flags matter.

    One that shows a pool got them from us.
    """
    return any(m.span.pages == 1 and not m.path.startswith(_OURS) for m in found)


def have_shadow_stacks(pid: int | str) -> bool:
    """Say whether a process has shadow stacks, which only smaps tells apart."""
    return b"x86_Thread_features:\tshstk" in Path(f"/proc/{pid}/status").read_bytes()


def _is_known(mapping: Mapping) -> bool:
    """Say whether there is nothing to try: it is out of the question, or too small."""
    hopeless = mapping.shared or mapping.special or not mapping.prot & libc.PROT_READ
    stack = mapping.path == "[stack]"
    return hopeless or stack or bool(mapping.flags) or mapping.span.pages == 1


def _by_name(mapping: Mapping) -> set[str]:
    return {"gd"} if mapping.path == "[stack]" else set()


class _Trial:
    """The rows of a call list that try one mapping."""

    def __init__(self, script: calls.CallList, mapping: Mapping, part: Span) -> None:
        start, prot = part.start, mapping.prot
        # Does nothing, but refuses locked memory (mm/msync.c).
        self._locked = script.syscall("msync", start, part.size, libc.MS_INVALIDATE)
        # Set the protection that is there: only a sealed mapping minds; and then with a
        # bit that is EINVAL for memory that does not grow (mm/mprotect.c).
        self._sealed = script.syscall("mprotect", start, PAGE_SIZE, prot)
        growing = (start, PAGE_SIZE, prot | libc.PROT_GROWSDOWN)
        self._grows = script.syscall("mprotect", *growing, want=-EINVAL)
        page = min(start, mapping.span.stop - 2 * PAGE_SIZE)
        pair = (page, 2 * PAGE_SIZE, _TOO_LONG, 0)
        self._whole = script.syscall("mremap", *pair, want=-ENOMEM)
        self._cleared: dict[str, tuple[int, int]] = {}
        for flag, (clear, restore) in _CLEARED.items():
            cleared = script.syscall("madvise", page, PAGE_SIZE, clear)
            split = script.syscall("mremap", *pair, want=-EFAULT)
            script.syscall("madvise", page, PAGE_SIZE, restore)
            for row in (cleared, split):
                script.otherwise(row, len(script))
            self._cleared[flag] = cleared, split
        for row in (self._locked, self._whole):
            script.otherwise(row, len(script))

    def read(self, results: npt.NDArray[np.int64]) -> set[str] | None:
        """Say which flags there are; None if something came between."""
        if results[self._locked] == -EBUSY:  # and may not grow: the limit may forbid it
            return {"lo"}
        if results[self._whole] != -ENOMEM:
            return None
        flags = set()
        if results[self._sealed] == -EPERM:
            flags.add("sl")
        if results[self._grows] == 0:
            flags.add("gd")
        for flag, (cleared, split) in self._cleared.items():
            if results[cleared] == -EINVAL:  # special mapping; droppable
                flags.add("io" if flag != "wf" else "dp")
            elif results[cleared] or results[split] not in (-ENOMEM, -EFAULT):
                return None
            elif results[split] == -EFAULT:
                flags.add(flag)
        return flags
