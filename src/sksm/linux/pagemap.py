"""Which pages of a range are present, written, private, zero: /proc/PID/pagemap.

Declarations: include/uapi/linux/fs.h. Behaviour:
Documentation/admin-guide/mm/pagemap.rst. `PAGEMAP_SCAN` since Linux 6.7
(52526ca7fdb9); the table of entries serves older kernels.
"""

from __future__ import annotations

import enum
import fcntl
import itertools
import os
from collections.abc import Iterator, Sequence
from ctypes import Structure, c_uint64, sizeof
from errno import EINVAL, ENOTTY
from typing import TYPE_CHECKING

import numpy as np

from sksm.linux.ioctl import IOWR
from sksm.spans import PAGE_SIZE, Span

if TYPE_CHECKING:
    import numpy.typing as npt


class Category(enum.IntFlag):
    """`PAGE_IS_*`: what the kernel can say of a page."""

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7


class pm_scan_arg(Structure):
    """The one argument of `PAGEMAP_SCAN`."""

    _fields_ = (
        ("size", c_uint64),
        ("flags", c_uint64),
        ("start", c_uint64),
        ("end", c_uint64),
        ("walk_end", c_uint64),  # out: where the walk stopped
        ("vec", c_uint64),  # address of page_region[vec_len]
        ("vec_len", c_uint64),
        ("max_pages", c_uint64),  # 0: no limit
        ("category_inverted", c_uint64),
        ("category_mask", c_uint64),
        ("category_anyof_mask", c_uint64),
        ("return_mask", c_uint64),
    )


PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC = 1, 2
_MOST_RUNS = 4096  # of one call
PAGEMAP_SCAN = IOWR(ord("f"), 16, pm_scan_arg)

# struct page_region. The kernel fills an array of these, so it is a dtype.
PAGE_REGION = np.dtype([("start", "<u8"), ("end", "<u8"), ("categories", "<u8")])

# Bits of one entry of the table, as pagemap.rst numbers them.
ENTRY_PRESENT, ENTRY_SWAPPED, ENTRY_FILE = 1 << 63, 1 << 62, 1 << 61
ENTRY_UFFD_WP = 1 << 57
ENTRY_EXCLUSIVE = 1 << 56  # no other page table maps the page; since 4.2
ENTRY_FRAME = (1 << 55) - 1  # zero without CAP_SYS_ADMIN


def scan(
    pagemap: int,
    span: Span,
    *,
    any_of: Category,
    returned: Category,
    limit: int = _MOST_RUNS,
) -> tuple[npt.NDArray[np.void], int]:
    """List the runs of pages in `span` that have some category of `any_of`.

    Args:
        pagemap: an open `/proc/<pid>/pagemap`.
        span: where to look, in that process.
        any_of: categories of which a page must have at least one.
        returned: categories to tell; neighbours that agree in them are one run.
        limit: most runs to return, in entries of 24 bytes.

    Returns:
        The runs, ascending, as a `PAGE_REGION` array, and the address where
        the walk stopped. It is `span.stop` unless `limit` was reached: call
        again from there.

    Raises:
        OSError: ENOTTY before Linux 6.7; ENOMEM if the kernel has no buffer.
    """
    wanted = pm_scan_arg(category_anyof_mask=any_of, return_mask=returned)
    return _scan(pagemap, span, wanted, limit)


def _scan(
    pagemap: int, span: Span, arg: pm_scan_arg, limit: int
) -> tuple[npt.NDArray[np.void], int]:
    found = np.empty(limit, PAGE_REGION)
    arg.size, arg.start, arg.end = sizeof(pm_scan_arg), span.start, span.stop
    arg.vec, arg.vec_len = found.ctypes.data, limit
    count = fcntl.ioctl(pagemap, PAGEMAP_SCAN, arg)  # raises OSError itself
    # The kernel gathers 512 runs, then walks on. If it so comes to the end, it leaves
    # `walk_end` where it gathered the last 512 (6.18 does): runs would come twice.
    if count < limit:
        return found[:count], span.stop
    return found, max(arg.walk_end, int(found["end"][-1]))


def write_protect(pagemap: int, span: Span) -> None:
    """Make the pages of `span` count as not `WRITTEN` until they are.

    Takes effect where a userfaultfd with `WP_ASYNC` watches.

    Raises:
        OSError: EPERM where none does; ENOTTY before Linux 6.7.
    """
    arg = pm_scan_arg(
        size=sizeof(pm_scan_arg),
        flags=PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        start=span.start,
        end=span.stop,
        category_anyof_mask=Category.WRITTEN,
        return_mask=Category.WRITTEN,
    )
    fcntl.ioctl(pagemap, PAGEMAP_SCAN, arg)


def written(pagemap: int, span: Span) -> Iterator[Span]:
    """List the runs of pages in `span` that were written to, as above."""
    at = span.start
    while at < span.stop:
        runs, at = scan(
            pagemap,
            Span(at, span.stop),
            any_of=Category.WRITTEN,
            returned=Category.WRITTEN,
        )
        for start, stop, _ in runs.tolist():
            yield Span(start, stop)


_WATCHED_AND_WRITTEN = Category.WPALLOWED | Category.WRITTEN


def take_written(pagemap: int, span: Span) -> npt.NDArray[np.void]:
    """List what was written to since the last time, and begin anew, in one walk.

    Only memory counts that a userfaultfd with `WP_ASYNC` watches; what else lies in
    `span` is passed over. A page that was never asked for counts as written.

    Returns:
        The runs, ascending, as a `PAGE_REGION` array, cut where they differ in
        `PRESENT`, `FILE` (the file's page, not a private copy) and `PFNZERO`. The
        first time there are pages among them that are not `PRESENT`.

    Raises:
        OSError: ESRCH when the process has ended or runs another program; ENOTTY
            before Linux 6.7.
    """
    wanted = pm_scan_arg(
        flags=PM_SCAN_WP_MATCHING,
        category_mask=_WATCHED_AND_WRITTEN,
        return_mask=Category.PRESENT | Category.FILE | Category.PFNZERO,
    )
    return _scan_all(pagemap, span, wanted)


def having(pagemap: int, span: Span, category: Category) -> npt.NDArray[np.void]:
    """List the runs, as above, of pages of a category: `PFNZERO`, or `HUGE`."""
    return _scan_all(pagemap, span, pm_scan_arg(category_mask=category))


def _scan_all(pagemap: int, span: Span, arg: pm_scan_arg) -> npt.NDArray[np.void]:
    parts, at = [np.empty(0, PAGE_REGION)], span.start
    while at < span.stop:
        found, at = _scan(pagemap, Span(at, span.stop), arg, _MOST_RUNS)
        parts.append(found)
    return np.concatenate(parts)


def numbers_of(runs: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """List the numbers (address // page size) of pages in runs, in order."""
    return spread(
        (runs["start"] // PAGE_SIZE).astype(np.int64),
        ((runs["end"] - runs["start"]) // PAGE_SIZE).astype(np.int64),
    )


def spread(
    firsts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """List `counts` numbers in a row from each of `firsts` on."""
    before = np.cumsum(counts) - counts
    numbers: npt.NDArray[np.int64] = np.repeat(firsts - before, counts)
    numbers += np.arange(len(numbers))
    return numbers


def walk(pagemap: int, span: Span, told: Category) -> Iterator[tuple[Span, Category]]:
    """Go through the runs of pages in `span` that are in memory or in swap.

    By `PAGEMAP_SCAN` if the kernel has it, else by the table, which does not know
    `PFNZERO` and `HUGE`.

    Args:
        pagemap: an open `/proc/<pid>/pagemap`.
        span: where to look, in that process.
        told: categories to tell; neighbours that agree in them are one run.
    """
    try:
        yield from _scanned(pagemap, span, told)
    except OSError as error:
        if error.errno not in (ENOTTY, EINVAL):  # before Linux 6.7
            raise
        yield from _listed(entries(pagemap, span), span, told)


def walked(pagemap: int, spans: Sequence[Span], told: Category) -> npt.NDArray[np.void]:
    """Do as `walk` does, for at least one span, ascending.

    Returns:
        The runs as a `PAGE_REGION` array; what lies between spans may be among them,
        as one walk over all is quicker than one for each.
    """
    around = Span(spans[0].start, spans[-1].stop)
    wanted = pm_scan_arg(category_anyof_mask=_SOMEWHERE, return_mask=told)
    try:
        return _scan_all(pagemap, around, wanted)
    except OSError as error:
        if error.errno not in (ENOTTY, EINVAL):  # before Linux 6.7
            raise
    listed = [run for span in spans for run in walk(pagemap, span, told)]
    rows = [(run.start, run.stop, int(category)) for run, category in listed]
    return np.array(rows, PAGE_REGION)


def _scanned(
    pagemap: int, span: Span, told: Category
) -> Iterator[tuple[Span, Category]]:
    at = span.start
    while at < span.stop:
        left = Span(at, span.stop)
        found, at = scan(pagemap, left, any_of=_SOMEWHERE, returned=told)
        for start, stop, categories in found.tolist():
            yield Span(start, stop), Category(categories)


def _listed(
    table: npt.NDArray[np.uint64], span: Span, told: Category
) -> Iterator[tuple[Span, Category]]:
    kinds = np.zeros(len(table), np.uint64)
    for bit, category in _ENTRY_CATEGORIES:
        if category & told:
            kinds[table & np.uint64(bit) != 0] |= np.uint64(category)
    if told & Category.WRITTEN:
        kinds[table & np.uint64(ENTRY_UFFD_WP) == 0] |= np.uint64(Category.WRITTEN)
    edges = np.flatnonzero(np.diff(kinds)) + 1
    for first, stop in itertools.pairwise([0, *edges.tolist(), len(kinds)]):
        if first < stop and int(kinds[first]) & _SOMEWHERE:
            start = span.start + first * PAGE_SIZE
            part = Span(start, start + (stop - first) * PAGE_SIZE)
            yield part, Category(int(kinds[first]))


_SOMEWHERE = Category.PRESENT | Category.SWAPPED
_ENTRY_CATEGORIES = (
    (ENTRY_PRESENT, Category.PRESENT),
    (ENTRY_SWAPPED, Category.SWAPPED),
    (ENTRY_FILE, Category.FILE),
)


def entries(pagemap: int, span: Span) -> npt.NDArray[np.uint64]:
    """Read the table entry of every page of `span`: shape (pages,).

    Raises:
        OSError: as `pread` does. A short table (the process is gone) reads as
            absent pages.
    """
    table = np.zeros(span.pages, "<u8")
    offset = span.start // PAGE_SIZE * table.itemsize
    os.preadv(pagemap, [table.data.cast("B")], offset)
    return table


def copied(table: int, spans: Sequence[Span]) -> npt.NDArray[np.int64]:
    """Number the pages that hold private copies where mappings show the pool.

    A swap entry counts only if it is not write-protected: the marker that
    userfaultfd leaves in an absent entry looks like one, and means nothing.

    Args:
        table: an open /proc/PID/pagemap.
        spans: the mappings in that process, ascending. Pages between them may be
            among the numbers.
    """
    told = Category.PRESENT | Category.SWAPPED | Category.FILE | Category.WRITTEN
    swapped = Category.SWAPPED | Category.WRITTEN
    runs = walked(table, spans, told)
    kinds = runs["categories"]
    private = kinds & np.uint64(Category.PRESENT) != 0
    private |= kinds & np.uint64(swapped) == np.uint64(swapped)
    private &= kinds & np.uint64(Category.FILE) == 0
    return numbers_of(runs[private])
