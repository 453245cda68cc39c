"""Which pages can be merged at all, and the batches in which they are taken."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from sksm.linux import libc, pagemap
from sksm.linux.maps import Mapping
from sksm.linux.pagemap import Category
from sksm.process import AddressSpace
from sksm.report import MergeReport
from sksm.spans import PAGE_SIZE, Span
from sksm.store.alone import APART
from sksm.store.pool import POOL_NAME

BATCH_PAGES = 4096  # 16 MiB: as much as memory may rise while merging

_NEAR_BYTES = 4 << 20
_TOLD = Category.PRESENT | Category.SWAPPED | Category.FILE | Category.PFNZERO
WATCHED = "watched by another userfaultfd"

# VmFlags (Documentation/filesystems/proc.rst) that a replacement would lose, or
# that say the memory is not ours to replace.
_FLAG_REASONS = {
    "sh": "shared mapping",
    "ht": "huge TLB pages",
    "lo": "locked memory",
    "sl": "sealed memory",
    "dd": "left out of core dumps (MADV_DONTDUMP)",
    "wf": "wiped on fork (MADV_WIPEONFORK)",
    "dc": "not copied on fork (MADV_DONTFORK)",
    "io": "device memory",
    "pf": "device memory",
    "mm": "device memory",
    "gd": "stack",
    "um": WATCHED,
    "uw": WATCHED,
    "ui": WATCHED,
    "ss": "shadow stack",
    "dp": "droppable memory",
}
# Of these, those that do not matter where a page is merged and not replaced.
KEPT_IN_PLACE = frozenset({"lo", "sl", "dd", "wf", "dc", "gd"})
UNTOUCHED, SWAPPED = "never touched", "swapped out"
UNWRITTEN_FILE = "file page, not written"
LAST_PAGE = "last page of its mapping"


@dataclasses.dataclass(frozen=True, slots=True)
class PageBatch:
    """Up to `BATCH_PAGES` pages of one mapping that may be merged."""

    mapping: Mapping
    spans: tuple[Span, ...]  # ascending, apart from each other
    last: bool = False  # the last page of what is offered
    lone: bool = False  # and all of it: an object, perhaps, that may grow

    @property
    def pages(self) -> int:
        """How many pages the batch holds."""
        return sum(span.pages for span in self.spans)


def why_not(mapping: Mapping, kept: frozenset[str] = frozenset()) -> str | None:
    """Say why no page of `mapping` can be merged; None if some may be.

    Args:
        mapping: with flags.
        kept: flags that a replacement would keep (`AddressSpace.keeps`).
    """
    if mapping.shared:
        return _FLAG_REASONS["sh"]
    if mapping.special:
        return f"special mapping {mapping.path}"
    if not mapping.prot & libc.PROT_READ:
        return "no permission to read it"
    for flag, reason in _FLAG_REASONS.items():
        if flag in mapping.flags and flag not in kept:
            return reason
    return None


def survey(
    space: AddressSpace,
    mapping: Mapping,
    parts: Sequence[Span],
    pool: str | None,
    *,
    followed: bool = False,
) -> tuple[MergeReport, list[Span]]:
    """Sort the pages of parts of a mapping by what the kernel says.

    Args:
        space: whose memory.
        mapping: one that `why_not` has no objection to.
        parts: where to look: at least one, ascending, apart from each other.
        pool: name of the pool whose clean pages are merged (`Store.name`). None:
            those of any pool are.
        followed: the range goes on where `mapping` ends, which is then no end of
            something that could grow.

    Returns:
        A report of the pages that are no candidates, and the spans of those
        that are: private pages that are in memory.
    """
    report = MergeReport()
    in_some_pool = is_pool(mapping)
    in_pool = in_some_pool and (pool is None or shows(mapping, pool))
    last = parts[-1]
    ends = last.stop == mapping.span.stop and not in_some_pool and not followed
    if ends and not space.tails:
        report.refuse(LAST_PAGE, 1)
        parts = [*parts[:-1], Span(last.start, last.stop - PAGE_SIZE)]
    candidates: list[Span] = []
    seen = 0
    for run, category in _runs(space.pagemap(), parts):
        seen += run.pages
        if category & Category.PFNZERO or (category & Category.FILE and in_pool):
            report.add(already=run.pages)
        elif category & Category.FILE and not in_some_pool:
            report.refuse(UNWRITTEN_FILE, run.pages)
        elif category & Category.PRESENT:
            _extend(candidates, run)
        else:
            report.refuse(SWAPPED, run.pages)
    untouched = sum(part.pages for part in parts) - seen
    # An absent page of a private file mapping is the file's. One of a pool is
    # merged, and has not been read since.
    if in_some_pool:
        report.add(already=untouched)
    else:
        report.refuse(UNWRITTEN_FILE if mapping.inode else UNTOUCHED, untouched)
    return report, candidates


def _runs(table: int, parts: Sequence[Span]) -> Iterator[tuple[Span, Category]]:
    """Go through the runs of pages in `parts`, with one walk over those that are near.

    A walk takes as long as its call does for 4 MiB.
    """
    for near in _neighbours(parts):
        first = 0
        walked = Span(near[0].start, near[-1].stop)
        for run, category in pagemap.walk(table, walked, _TOLD):
            while near[first].stop <= run.start:
                first += 1
            for part in itertools.islice(near, first, None):
                if part.start >= run.stop:
                    break
                yield run & part, category


def _neighbours(parts: Sequence[Span]) -> Iterator[list[Span]]:
    near: list[Span] = []
    for part in parts:
        if near and part.start - near[-1].stop > _NEAR_BYTES:
            yield near
            near = []
        near.append(part)
    yield near


def batches(mapping: Mapping, candidates: list[Span]) -> Iterator[PageBatch]:
    """Cut candidates into batches, long ones at multiples of a batch's size.

    Huge pages are then replaced whole, and page tables can move whole.
    """
    step = BATCH_PAGES * PAGE_SIZE
    held: list[Span] = []
    room = BATCH_PAGES
    for candidate in candidates:
        start = candidate.start
        while start < candidate.stop:
            stop = min(candidate.stop, (start // step + 1) * step)
            stop = min(stop, start + room * PAGE_SIZE)
            held.append(Span(start, stop))
            room -= held[-1].pages
            start = stop
            if room == 0 or start % step == 0:
                yield PageBatch(mapping, tuple(held))
                held, room = [], BATCH_PAGES
    if held:
        yield PageBatch(mapping, tuple(held))


def without_tail(
    mapping: Mapping, end: int, candidates: list[Span], *, lone: bool
) -> tuple[list[Span], PageBatch | None]:
    """Take the last page of what is offered, if it is among them, out of candidates.

    Args:
        mapping: whose pages they are.
        end: where the part of it ends that is offered.
        candidates: ascending, at least one.
        lone: no more than a page is offered.
    """
    last = candidates[-1]
    if last.stop != end:
        return candidates, None
    edge = last.stop - PAGE_SIZE
    rest = [Span(last.start, edge)] if last.start < edge else []
    lone &= _may_be_an_object(mapping)
    tail = PageBatch(mapping, (Span(edge, last.stop),), last=True, lone=lone)
    return candidates[:-1] + rest, tail


def _may_be_an_object(mapping: Mapping) -> bool:
    """Say whether one page of a mapping may be all of what the program mapped."""
    if is_pool(mapping):
        return mapping.offset // PAGE_SIZE >= APART
    return mapping.anonymous or mapping.span.pages == 1


def continues(mapping: Mapping, behind: Mapping) -> bool:
    """Say whether two neighbours were one mapping, as far as the program knows.

    That is, until part of it was merged.
    """
    merged = is_pool(mapping) or is_pool(behind)
    return merged and mapping.prot == behind.prot and not behind.shared


def is_pool(mapping: Mapping) -> bool:
    """Say whether `mapping` shows a pool, the current one or one left behind."""
    return mapping.path.startswith(f"/memfd:{POOL_NAME}") and not mapping.shared


def shows(mapping: Mapping, pool: str) -> bool:
    """Say whether `mapping` shows the pool of that name (`Store.name`)."""
    return mapping.path.removesuffix(" (deleted)") == f"/memfd:{pool}"


def _extend(spans: list[Span], run: Span) -> None:
    if spans and spans[-1].stop == run.start:
        spans[-1] = Span(spans[-1].start, run.stop)
    else:
        spans.append(run)
