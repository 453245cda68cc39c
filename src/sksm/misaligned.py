"""Equal bytes at different offsets within a page, which no merge can share: a hint.

Arrays of 20 MiB that malloc placed 16 bytes behind a page's start in one process and
64 in another have no equal page. To find them at a bounded cost, the content chooses
which windows of 16 bytes are compared: those whose hash begins with zeros. They are
the same ones at any offset that malloc gives, a multiple of 16. Where several equal
windows lie as far apart from each other in both places, the pages around are compared
byte by byte, and only what is equal counts.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sksm.estimate import Estimate
from sksm.fingerprints import of_zeros
from sksm.process import AddressSpace, pages_of, spans_of
from sksm.spans import PAGE_SIZE, Span, groups
from sksm.twins import Flags

MOST_BYTES = 1 << 30  # looked at, at about 1 GiB/s; the longest runs first
LEAST_PAGES = 16  # in a row without a twin: shorter runs are no large array

_WINDOW = 16  # bytes
_HASH_BITS = 6  # of a window's hash that must be zero: 4 anchors a page
_MOST_ANCHORS = 16  # in a page; more are a pattern that repeats
_LEAST_PAIRS = 8  # of anchors that agree on a shift
_MOST_ALIKE = 32  # anchors with one content; more are padding, not data
_MOST_SHIFTS = 256
_REACH = 4  # pages around an anchor in which its array is expected to go on
_GROUP_PAGES = 512
_ODD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclasses.dataclass(slots=True)
class Part:
    """The pages of one process that are looked at, ascending."""

    space: AddressSpace
    numbers: npt.NDArray[np.int64]
    alone: Flags  # has no twin; others stand for their twins


@dataclasses.dataclass(slots=True)
class Misaligned:
    """What was found."""

    bytes_of: dict[int, int]  # pid -> in pages without a twin, equal to bytes elsewhere
    whole: bool = True  # else only `MOST_BYTES` were looked at

    @property
    def total_bytes(self) -> int:
        """In all processes."""
        return sum(self.bytes_of.values())


def find(estimate: Estimate, spaces: dict[int, AddressSpace]) -> Misaligned:
    """Search an estimate's processes for equal bytes at different offsets.

    Args:
        estimate: which pages have twins already.
        spaces: by pid. A process that ends has nothing to find.
    """
    parts = [
        _part(estimate, pid, space)
        for pid, space in spaces.items()
        if pid in estimate.holdings
    ]
    whole = _shorten(parts)
    found = search(parts)
    return Misaligned(
        {
            part.space.pid: int(flags.sum()) * PAGE_SIZE
            for part, flags in zip(parts, found, strict=True)
        },
        whole,
    )


def _part(estimate: Estimate, pid: int, space: AddressSpace) -> Part:
    """Take a process's pages without a twin, and of those with one the first."""
    holding, twins = estimate.holdings[pid], estimate.compared[pid]
    zero = holding.prints == np.uint64(of_zeros(estimate.seed))
    alone = ~twins.twin & ~twins.shares & ~zero
    wanted = np.flatnonzero(alone | twins.kept)
    run = np.cumsum(np.diff(holding.numbers[wanted], prepend=0) != 1)
    wanted = wanted[np.bincount(run)[run] >= LEAST_PAGES] if len(run) else wanted
    return Part(space, holding.numbers[wanted], alone[wanted])


def _shorten(parts: list[Part]) -> bool:
    """Keep the longest runs, as much as may be looked at. True if that is all."""
    runs = [(span, part) for part in parts for span in spans_of(part.numbers)]
    if sum(span.size for span, _ in runs) <= MOST_BYTES:
        return True
    left, kept = MOST_BYTES, []
    for span, part in sorted(runs, key=lambda run: -run[0].size):
        kept.append((span, part))
        left -= span.size
        if left <= 0:
            break
    for part in parts:
        spans = sorted(span for span, owner in kept if owner is part)
        inside = np.isin(part.numbers, pages_of(spans))
        part.numbers, part.alone = part.numbers[inside], part.alone[inside]
    return False


def search(parts: list[Part]) -> list[Flags]:
    """Find the pages without a twin whose bytes are also elsewhere.

    Of two places that hold the same, one counts.

    Returns:
        For each page of each part whether it was found.
    """
    found = [np.zeros(len(part.numbers), bool) for part in parts]
    for home, owner, shift, numbers in _shifts(*_all_anchors(parts)):
        part = parts[owner]
        near = _around(part.numbers, numbers) & part.alone & ~found[owner]
        first = part.numbers - shift // PAGE_SIZE - 1  # of two pages with the bytes
        near &= _among(parts[home].numbers, first)
        near &= _among(parts[home].numbers, first + 1)
        for index, span in _indexed(part.numbers, np.flatnonzero(near)):
            equal = _equal(parts[home].space, part.space, span, shift)
            found[owner][index : index + span.pages] |= equal
    return found


def anchors(
    rows: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """Give the offset, in bytes from the first row, and hash of each anchor."""
    words = rows.view(np.uint64).reshape(-1, 2)
    hashes = words[:, 1] * _ODD[0]
    hashes ^= words[:, 0]
    hashes *= _ODD[1]
    at = np.flatnonzero(hashes < np.uint64(1 << (64 - _HASH_BITS)))
    page = at // (PAGE_SIZE // _WINDOW)
    at = at[np.bincount(page, minlength=1)[page] <= _MOST_ANCHORS]
    return at * _WINDOW, hashes[at]


_Anchors = tuple[
    npt.NDArray[np.int64],  # which part
    npt.NDArray[np.int64],  # address
    npt.NDArray[np.uint64],  # hash
    Flags,  # whether its page has no twin
]


def _all_anchors(parts: list[Part]) -> _Anchors:
    owners, places, hashes, alone = [], [], [], []
    for owner, part in enumerate(parts):
        for index, span in _indexed(part.numbers, np.arange(len(part.numbers))):
            rows = _read(part.space, span)
            if rows is None:
                continue
            at, values = anchors(rows)
            owners.append(np.full(len(at), owner))
            places.append(at + span.start)
            hashes.append(values)
            alone.append(part.alone[index + at // PAGE_SIZE])
    if not owners:
        none = np.empty(0, np.int64)
        return none, none, none.astype(np.uint64), none.astype(bool)
    return (
        np.concatenate(owners),
        np.concatenate(places),
        np.concatenate(hashes),
        np.concatenate(alone),
    )


def _shifts(
    owners: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    alone: Flags,
) -> Iterator[tuple[int, int, int, npt.NDArray[np.int64]]]:
    """Pair equal anchors, and sum up pairs that are equally far apart.

    Yields:
        The part where the bytes are, too; the part in which they count; how much
        farther they are there; and the numbers of the pages in which they begin.
        The most frequent first.
    """
    order = np.lexsort((alone, hashes))  # those with twins first: they do not count
    begins = np.ones(len(order), bool)
    begins[1:] = np.diff(hashes[order]) != 0
    group = np.cumsum(begins) - 1
    home = order[np.flatnonzero(begins)][group]
    shift = places[order] - places[home]
    pairs = np.flatnonzero(
        alone[order]
        & (shift % PAGE_SIZE != 0)
        & (np.bincount(group, minlength=1)[group] <= _MOST_ALIKE)
    )
    if not len(pairs):
        return
    here, there = order[pairs], home[pairs]
    keys = np.stack([owners[there], owners[here], shift[pairs]])
    shifts, which, counts = np.unique(
        keys, axis=1, return_inverse=True, return_counts=True
    )
    by_shift = np.argsort(which, kind="stable")
    ends = np.cumsum(counts)
    for best in np.argsort(-counts, kind="stable")[:_MOST_SHIFTS].tolist():
        if counts[best] < _LEAST_PAIRS:
            return
        members = by_shift[ends[best] - counts[best] : ends[best]]
        numbers = np.unique(places[here[members]] // PAGE_SIZE)
        yield (*shifts[:, best].tolist(), numbers)


def _around(numbers: npt.NDArray[np.int64], centres: npt.NDArray[np.int64]) -> Flags:
    """Find the pages that are at most `_REACH` from one of `centres` (ascending)."""
    right = np.searchsorted(centres, numbers)
    after = centres[np.minimum(right, len(centres) - 1)]
    before = centres[np.maximum(right - 1, 0)]
    near: Flags = np.minimum(abs(after - numbers), abs(numbers - before)) <= _REACH
    return near


def _among(numbers: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> Flags:
    """Say which of `wanted` are in `numbers`, which is ascending and not empty."""
    at = np.searchsorted(numbers, wanted)
    there: Flags = numbers[np.minimum(at, len(numbers) - 1)] == wanted
    return there


def _indexed(
    numbers: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]
) -> Iterator[tuple[int, Span]]:
    """Cut chosen pages (indices, ascending) into spans, each with its first index."""
    at = 0
    for span in itertools.chain.from_iterable(
        groups(spans_of(numbers[chosen]), _GROUP_PAGES)
    ):
        yield int(chosen[at]), span
        at += span.pages


def _equal(home: AddressSpace, there: AddressSpace, span: Span, shift: int) -> Flags:
    """Compare the pages of a span with the bytes that are `shift` before them."""
    start = span.start - shift
    first = start // PAGE_SIZE * PAGE_SIZE
    around = _read(home, Span(first, first + span.size + PAGE_SIZE))
    if around is None:
        return np.zeros(span.pages, bool)
    flat = around.reshape(-1)[start - first :][: span.size].copy()
    rows = _read(there, span)
    if rows is None:
        return np.zeros(span.pages, bool)
    same = flat.view(np.uint64).reshape(span.pages, -1) == rows.view(np.uint64)
    equal: Flags = same.all(axis=1)
    return equal


def _read(space: AddressSpace, span: Span) -> npt.NDArray[np.uint8] | None:
    try:
        return space.read([span])
    except ProcessLookupError:
        return None
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return None
