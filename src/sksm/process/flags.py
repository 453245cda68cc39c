"""The flags of a mapping of this process, found by effect instead of by smaps.

The kernel tells `VmFlags` only in /proc/PID/smaps, and writing that walks the
page tables of every mapping before: 28 ms per GiB of small pages, for the sake of
a call on one page. But for each flag that matters there is a call that would do
nothing to a mapping without it. Such calls take 1 us.
"""

from __future__ import annotations

import dataclasses
import functools
from errno import EBUSY, EINVAL, ENOTTY, EPERM
from pathlib import Path

from sksm.linux import libc, maps
from sksm.linux.maps import Mapping
from sksm.spans import PAGE_SIZE, Span

# Clearing a flag (mm/madvise.c) leaves a mapping alone that does not have it, and
# splits one that has it, around the page it is cleared for.
_CLEARED = {
    "dc": (libc.MADV_DOFORK, libc.MADV_DONTFORK),
    "wf": (libc.MADV_KEEPONFORK, libc.MADV_WIPEONFORK),
    "dd": (libc.MADV_DODUMP, libc.MADV_DONTDUMP),
}


def flagged_mappings(table: int, span: Span) -> list[Mapping]:
    """List the mappings of this process that meet `span`, with flags.

    Gives what `maps.mappings("self", span)` gives, with those flags that forbid
    a merge, in microseconds; and falls back to it before Linux 6.11. `table` is
    an open /proc/self/maps.

    Of a mapping of one page, the flags that are found by a split are not told:
    such a page is the last of its mapping, and not merged for that reason; or it
    shows the pool, and got its flags from us.
    """
    try:
        found = list(maps.query(table, span))
    except OSError as error:
        if error.errno != ENOTTY:
            raise
        return maps.mappings("self", span)
    tried = [_with_flags(table, mapping, mapping.span & span) for mapping in found]
    if None in tried:
        return maps.mappings("self", span)
    return [mapping for mapping in tried if mapping is not None]


def _with_flags(table: int, mapping: Mapping, part: Span) -> Mapping | None:
    """Try `mapping` for flags; None if only smaps can tell."""
    if mapping.path == "[stack]":
        return dataclasses.replace(mapping, flags=frozenset({"gd"}))
    if _hopeless(mapping):
        return mapping
    if _shadow_stacks():
        return None
    if mapping.span.pages == 1:  # a split would not show; see `flagged_mappings`
        return mapping
    flags = _locked(part) | _sealed(mapping, part) | _grows_down(mapping, part)
    for flag in _CLEARED:
        answer = _try_clearing(table, mapping, part, flag)
        if answer is None:
            return None
        flags |= answer
    return dataclasses.replace(mapping, flags=frozenset(flags))


def _hopeless(mapping: Mapping) -> bool:
    """Say whether a mapping is out of the question without its flags."""
    unreadable = not mapping.prot & libc.PROT_READ
    return mapping.shared or mapping.special or unreadable or bool(mapping.flags)


def _locked(part: Span) -> set[str]:
    """`msync(MS_INVALIDATE)` does nothing, but refuses locked memory (mm/msync.c)."""
    try:
        libc.msync(part.start, part.size, libc.MS_INVALIDATE)
    except OSError as error:
        if error.errno != EBUSY:
            raise
        return {"lo"}
    return set()


def _sealed(mapping: Mapping, part: Span) -> set[str]:
    """Setting the protection that is there does nothing, but not to a sealed VMA."""
    # SAFETY: the protection stays what it is.
    try:
        libc.mprotect(part.start, PAGE_SIZE, mapping.prot)
    except OSError as error:
        if error.errno != EPERM:
            raise
        return {"sl"}
    return set()


def _grows_down(mapping: Mapping, part: Span) -> set[str]:
    """`PROT_GROWSDOWN` is EINVAL for memory that does not grow (mm/mprotect.c)."""
    # SAFETY: as above.
    try:
        libc.mprotect(part.start, PAGE_SIZE, mapping.prot | libc.PROT_GROWSDOWN)
    except OSError as error:
        if error.errno not in (EINVAL, EPERM):
            raise
        return set()
    return {"gd"}


def _try_clearing(
    table: int, mapping: Mapping, part: Span, flag: str
) -> set[str] | None:
    """Clear a flag for one page; if that split the mapping, it was set: set again.

    A split shows in the next page: its mapping begins there now, which nothing
    else that another thread maps or unmaps could bring about. For the
    microseconds between, a child forked by another thread has this page.
    """
    clear, restore = _CLEARED[flag]
    page = min(part.start, mapping.span.stop - 2 * PAGE_SIZE)
    try:
        libc.madvise(page, PAGE_SIZE, clear)
    except OSError as error:
        if error.errno != EINVAL:
            raise
        return {"io"} if flag != "wf" else {"dp"}  # special mapping; droppable
    behind = maps.bounds(table, page + PAGE_SIZE)
    if behind is None:
        return None
    if behind.start == page + PAGE_SIZE:
        libc.madvise(page, PAGE_SIZE, restore)
        return {flag}
    return set()


@functools.cache  # libc turns them on before the program starts, or not at all
def _shadow_stacks() -> bool:
    """Say whether this process has shadow stacks, which only smaps tells apart."""
    return b"x86_Thread_features:\tshstk" in Path("/proc/self/status").read_bytes()
