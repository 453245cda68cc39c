"""Which pages of a set have an equal one elsewhere: pure arithmetic on arrays.

All arrays have one entry a page, process after process, addresses ascending. A
page's name is its fingerprint; its frame a number that equal pages have in common
if they share a page frame already, and 0 for a page that nobody else maps.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from sksm.store import UNSEEN

Flags = npt.NDArray[np.bool_]
_ODD = np.uint64(0x9E3779B97F4A7C15)  # spreads frame numbers over 64 bits


@dataclasses.dataclass(frozen=True, slots=True)
class Twins:
    """What becomes of each page if equal ones share a frame."""

    twin: Flags  # has an equal page in another frame, and merging frees one of them
    freed: Flags  # its frame is one of those that are freed
    kept: Flags  # its frame stands for the one that all equal pages then share
    shares: Flags  # shares its frame now, with an earlier page or outside the set
    outside: Flags  # of these, those whose frame stays for a process outside the set
    slots: npt.NDArray[np.int64]  # order in which a pool would take them, or `UNSEEN`


def compare(
    prints: npt.NDArray[np.uint64],
    frames: npt.NDArray[np.uint64],
    known: Flags,
    zero: int,
) -> Twins:
    """Find the pages whose content is in more than one frame.

    A page that shares its frame with no other page of the set, but with one
    outside, frees nothing, since the frame stays for the other.

    Args:
        prints: fingerprints.
        frames: which pages share a frame now.
        known: contents that a pool holds: a single frame of these is one too many.
        zero: fingerprint of pages of zeros. They have no twins, as the kernel has a
            frame for all of them.
    """
    free, outside = _owners(prints, frames)
    order = np.argsort(prints, kind="stable")
    ordered = prints[order]
    begins = np.ones(len(order), bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    firsts = np.flatnonzero(begins)
    name = np.cumsum(begins) - 1  # which content, in the order of fingerprints
    seen = np.cumsum(free[order])
    before: npt.NDArray[np.int64] = seen[firsts] - free[order[firsts]]
    frames_of = np.diff(np.append(before, seen[-1:]))
    pooled = known[order[firsts]]
    twins = np.where(pooled, frames_of >= 1, frames_of >= 2)
    twins &= ordered[firsts] != np.uint64(zero)
    surplus = free[order] & twins[name] & (pooled[name] | (seen - before[name] > 1))
    places = np.full(len(firsts), UNSEEN, np.int64)
    wanted = np.flatnonzero(twins)
    places[wanted[np.argsort(order[firsts[wanted]])]] = np.arange(len(wanted))
    twin, freed = np.empty(len(order), bool), np.empty(len(order), bool)
    slots = np.empty(len(order), np.int64)
    twin[order], freed[order], slots[order] = twins[name], surplus, places[name]
    return Twins(twin, freed, twin & free & ~freed, ~free, outside, slots)


def _owners(
    prints: npt.NDArray[np.uint64], frames: npt.NDArray[np.uint64]
) -> tuple[Flags, Flags]:
    """Of the pages in one frame, find the first; and those that are the only one."""
    free, outside = np.ones(len(prints), bool), np.zeros(len(prints), bool)
    shared = np.flatnonzero(frames)
    if len(shared):
        # The frame's number may be a guess (`holding`), hence the content, too.
        keys = prints[shared] ^ (frames[shared] * _ODD)
        _, firsts, users = np.unique(keys, return_index=True, return_counts=True)
        free[shared] = False
        free[shared[firsts[users > 1]]] = True
        outside[shared[firsts[users == 1]]] = True
    return free, outside


def stretches(
    numbers: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Number the stretches of pages that follow each other in one mapping.

    Args:
        numbers: page numbers, ascending.
        starts: page numbers where mappings begin, ascending.
    """
    begins = np.zeros(len(numbers), bool)
    begins[1:] = np.diff(numbers) != 1
    at = np.searchsorted(numbers, starts)
    begins[at[at < len(numbers)]] = True
    return np.cumsum(begins)


def pieces(
    wanted: Flags, stretch: npt.NDArray[np.int64], gap: int
) -> npt.NDArray[np.int64]:
    """Join wanted pages into pieces, across gaps of up to `gap` other pages.

    Args:
        wanted: the pages that must be in a piece.
        stretch: as `stretches` gives them. No piece is part of two.
        gap: most unwanted pages in a row within a piece.

    Returns:
        First index and index behind the last of each piece: shape (pieces, 2).
    """
    at = np.flatnonzero(wanted)
    if not len(at):
        return np.empty((0, 2), np.int64)
    apart = (np.diff(at) > gap + 1) | (np.diff(stretch[at]) != 0)
    firsts = at[np.concatenate(([True], apart))]
    stops = at[np.concatenate((apart, [True]))] + 1
    return np.stack([firsts, stops], axis=1)
