"""Which pages are candidates, and the batches they are taken in."""

import errno
import mmap
import os
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksm import pages
from sksm.linux import pagemap
from sksm.linux.features import Feature
from sksm.linux.maps import Mapping
from sksm.linux.pagemap import Category
from sksm.pages import BATCH_PAGES, PageBatch
from sksm.spans import PAGE_SIZE, Span

pytestmark = pytest.mark.check

BASE = 0x7F00_0000_0000

TOLD = pages._TOLD


def span(first, stop):
    return Span(BASE + first * PAGE_SIZE, BASE + stop * PAGE_SIZE)


def mapping(size, **changes):
    usual = {"prot": 3, "shared": False, "offset": 0, "device": "00:00", "inode": 0}
    return Mapping(**{"span": span(0, size), **usual, "path": "", **changes})


NAME = "sksm-pool-1234abcd"
POOL = {"inode": 7, "device": "00:01", "path": f"/memfd:{NAME} (deleted)"}


# -- why not


@pytest.mark.parametrize("flag", sorted(pages._FLAG_REASONS))
def test_every_unusual_flag_is_a_reason(flag):
    """Memory whose nature a replacement would lose is left alone."""
    found = pages.why_not(mapping(1, flags=frozenset({"rd", "wr", flag})))
    assert found == pages._FLAG_REASONS[flag]


def test_usual_memory_has_no_reason():
    """Anonymous memory, the heap, named memory and private files may merge."""
    usual = frozenset(["rd", "wr", "mr", "mw", "me", "ac", "sd", "nr", "nh", "hg"])
    for path in ("", "[heap]", "[anon:x]", "/lib/x.so"):
        assert pages.why_not(mapping(1, path=path, flags=usual)) is None


@pytest.mark.parametrize("path", ["[vdso]", "[vvar]", "[vsyscall]"])
def test_special_mappings_are_named(path):
    """The kernel's own pages are not the program's data."""
    assert path in pages.why_not(mapping(1, path=path))


# -- survey


def surveyed(monkeypatch, mapped, runs, part=None):
    monkeypatch.setattr(pagemap, "walk", lambda *_: iter(runs))
    space = types.SimpleNamespace(pagemap=lambda: -1, tails=False)
    return pages.survey(space, mapped, [part or mapped.span], NAME)


def test_pages_are_sorted_by_what_the_kernel_says(monkeypatch):
    """Swapped, zero, untouched and last pages are counted; the rest are offered."""
    runs = [
        (span(0, 2), Category.PRESENT),
        (span(2, 3), Category.SWAPPED),
        (span(3, 4), Category.PRESENT | Category.PFNZERO),
        (span(6, 8), Category.PRESENT),
        (span(8, 9), Category.PRESENT),
    ]
    report, found = surveyed(monkeypatch, mapping(10), runs)
    assert found == [span(0, 2), span(6, 9)]
    assert report.already == 1
    assert report.reasons == {
        pages.SWAPPED: 1,
        pages.UNTOUCHED: 2,
        pages.LAST_PAGE: 1,
    }


def test_pages_of_a_file_are_candidates_once_written(monkeypatch):
    """What still is the page cache's is shared already, by all who map it."""
    runs = [
        (span(0, 2), Category.PRESENT | Category.FILE),
        (span(2, 4), Category.PRESENT),
    ]
    mapped = mapping(6, inode=9, path="/lib/x.so")
    report, found = surveyed(monkeypatch, mapped, runs, span(0, 5))
    assert found == [span(2, 4)]
    assert report.reasons == {pages.UNWRITTEN_FILE: 3}


def test_clean_pages_of_the_pool_are_already_merged(monkeypatch):
    """Read or not; what was written since is a candidate again."""
    runs = [
        (span(0, 2), Category.PRESENT | Category.FILE),
        (span(2, 3), Category.PRESENT),
    ]
    report, found = surveyed(monkeypatch, mapping(5, **POOL), runs)
    assert (found, report.already, report.refused) == ([span(2, 3)], 4, 0)


def test_pages_of_a_pool_left_behind_move_to_the_current_one(monkeypatch):
    """A daemon that died left its pool; its pages are read and offered anew."""
    mapped = mapping(3, **{**POOL, "path": "/memfd:sksm-pool-1234abce (deleted)"})
    runs = [(span(0, 2), Category.PRESENT | Category.FILE)]
    report, found = surveyed(monkeypatch, mapped, runs)
    assert found == [span(0, 2)]
    assert report.scanned == 1


# -- batches


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 3 * BATCH_PAGES)), max_size=9)
)
def test_batches_hold_every_candidate_once_in_order(pieces):
    """Up to `BATCH_PAGES` each, and none reaches across a multiple of it."""
    candidates, at = [], 1
    for gap, size in pieces:
        candidates.append(span(at + gap, at + gap + size))
        at += gap + size
    found = list(pages.batches(mapping(at), candidates))
    taken = [page for b in found for s in b.spans for page in page_numbers(s)]
    assert taken == [page for s in candidates for page in page_numbers(s)]
    assert all(0 < batch.pages <= BATCH_PAGES for batch in found)
    for one in (s for batch in found for s in batch.spans):
        first, last = page_numbers(one)[0], page_numbers(one)[-1]
        assert first // BATCH_PAGES == last // BATCH_PAGES


def page_numbers(one):
    return range(one.start // PAGE_SIZE, one.stop // PAGE_SIZE)


def test_a_batch_counts_the_pages_of_all_its_spans():
    """Its size is what the budget of a batch is counted in."""
    assert PageBatch(mapping(9), (span(0, 2), span(5, 8))).pages == 5


# -- the two ways to ask the kernel


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Anonymous pages, then those of a file: written, read, untouched, mixed."""
    path = tmp_path_factory.mktemp("mixed") / "file"
    path.write_bytes(b"f" * 64 * PAGE_SIZE)
    areas = [mmap.mmap(-1, 64 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)]
    with path.open("rb") as file:
        areas.append(mmap.mmap(file.fileno(), 64 * PAGE_SIZE, flags=mmap.MAP_PRIVATE))
    spans = []
    for area, seed in zip(areas, (1, 2), strict=True):
        rows = np.frombuffer(area, np.uint8).reshape(64, PAGE_SIZE)
        what = np.random.default_rng(seed).integers(0, 3, 64).repeat(2)[:64]
        rows[what == 1, 0] = 1
        int(rows[what == 2, 0].sum())
        spans.append(Span(rows.ctypes.data, rows.ctypes.data + rows.nbytes))
    yield spans
    del rows
    assert areas  # mapped until here


def by_page(runs):
    """Spread runs out: page -> categories, without word of the zero page."""
    told = ~(Category.PFNZERO | Category.HUGE)
    return {page: kind & told for one, kind in runs for page in page_numbers(one)}


@pytest.mark.needs(Feature.PAGEMAP_SCAN)
@pytest.mark.parametrize("which", [0, 1], ids=["anonymous", "file"])
@given(st.lists(st.integers(0, 64), min_size=2, max_size=2).map(sorted))
def test_table_and_scan_tell_the_same(mixed, which, bounds):
    """Kernels before 6.7 see the same pages, apart from the zero page."""
    start = mixed[which].start
    part = Span(*(start + page * PAGE_SIZE for page in bounds))
    with open("/proc/self/pagemap", "rb", buffering=0) as table:
        listed = list(
            pagemap._listed(pagemap.entries(table.fileno(), part), part, TOLD)
        )
        assert by_page(listed) == by_page(pagemap._scanned(table.fileno(), part, TOLD))
        assert all(one.pages for one, _ in listed)


@pytest.mark.needs(Feature.PAGEMAP_SCAN)
def test_a_scan_goes_on_where_its_buffer_was_full(mixed, pagemap_fd, monkeypatch):
    """More runs than one call returns are told all the same."""
    whole = list(pagemap._scanned(pagemap_fd, mixed[0], TOLD))
    scan = pagemap.scan
    few = lambda *args, **kw: scan(*args, **kw, limit=3)  # noqa: E731
    monkeypatch.setattr(pagemap, "scan", few)
    assert by_page(pagemap._scanned(pagemap_fd, mixed[0], TOLD)) == by_page(whole)
    assert len(whole) > 3


@pytest.mark.needs(Feature.PAGEMAP_SCAN)
@pytest.mark.parametrize("runs", [511, 512, 513, 1600, 4096, 4097, 4700])
def test_a_scan_of_many_runs_tells_each_once(anonymous, pagemap_fd, runs):
    """Also where the kernel says that it came less far than it did."""
    area, rows = anonymous(2 * runs)
    for page in range(0, len(rows), 2):
        rows[page, 0] = 1
    found = list(pagemap.walk(pagemap_fd, area, Category.PRESENT))
    assert [one.pages for one, _ in found] == [1] * runs
    assert [one.start for one, _ in found] == list(
        range(area.start, area.stop, 2 * PAGE_SIZE)
    )


@pytest.mark.parametrize("code", [errno.ENOTTY, errno.EINVAL])
def test_a_kernel_without_the_scan_is_asked_by_table(
    mixed, pagemap_fd, monkeypatch, code
):
    """Only errnos that mean "not here" lead there."""

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    listed = pagemap._listed(pagemap.entries(pagemap_fd, mixed[0]), mixed[0], TOLD)
    monkeypatch.setattr(pagemap, "scan", refuse)
    assert list(pagemap.walk(pagemap_fd, mixed[0], TOLD)) == list(listed)


def test_other_failures_of_the_scan_are_raised(mixed, pagemap_fd, monkeypatch):
    """A lack of memory is not taken for an old kernel."""

    def refuse(*_, **__):
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(pagemap, "scan", refuse)
    with pytest.raises(OSError, match="no memory"):
        list(pagemap.walk(pagemap_fd, mixed[0], TOLD))


def test_only_pages_within_the_parts_count(monkeypatch):
    """Parts that are near share a walk, which meets what lies between them."""
    walks = []

    def walk(_, walked, __):
        walks.append(walked)
        yield walked, Category.PRESENT

    monkeypatch.setattr(pagemap, "walk", walk)
    space = types.SimpleNamespace(pagemap=lambda: -1, tails=False)
    parts = [span(0, 2), span(3, 4), span(2000, 2003), span(2010, 2020)]
    report, found = pages.survey(space, mapping(2020), parts, NAME)
    assert walks == [span(0, 4), span(2000, 2019)]
    assert found == [*parts[:-1], span(2010, 2019)]
    assert report.reasons == {pages.LAST_PAGE: 1}
    assert report.scanned == 1
