"""Private mappings of files: what was written merges, what is clean is the file's."""

import os

import pytest

import sksm
from sksm import pages
from sksm.linux import libc
from sksm.spans import PAGE_SIZE

pytestmark = pytest.mark.usefixtures("here", "threads")

PAGES = 8


@pytest.fixture
def file(tmp_path, different):
    """A file of eight pages, and their bytes."""
    content = different(PAGES)
    path = tmp_path / "file"
    path.write_bytes(content.tobytes())
    fd = os.open(path, os.O_RDONLY)
    yield fd, content
    os.close(fd)
    assert path.read_bytes() == content.tobytes()


@pytest.fixture
def mapped(area, file):
    """Map the file privately, for reading and writing."""
    return lambda: area(PAGES, flags=libc.MAP_PRIVATE, fd=file[0])


def test_written_pages_merge_and_clean_ones_do_not(mapped, file, different):
    """The page cache shares clean pages already; written ones are private."""
    one, two = mapped(), mapped()
    expected = file[1].copy()
    expected[2:5] = different(3)
    for each in (one, two):
        each.rows[2:5] = expected[2:5]
        int(each.rows[0, 0])  # read, and so present, but clean

    first = sksm.merge_range(*one.where)
    second = sksm.merge_range(*two.where)

    assert (first.stored, second.merged) == (3, 3)
    for report in (first, second):
        assert report.reasons == {
            pages.UNWRITTEN_FILE: PAGES - 4,
            pages.LAST_PAGE: 1,
        }
    assert (one.rows == expected).all()
    assert (two.rows == expected).all()


@pytest.mark.check
@pytest.mark.root
def test_written_pages_of_a_file_share_frames(mapped, different):
    """Also with anonymous memory of the same bytes."""
    one, two = mapped(), mapped()
    one.rows[2:5] = two.rows[2:5] = different(3)
    sksm.merge_range(*one.where)
    sksm.merge_range(*two.where)
    assert (one.frames() == two.frames())[2:5].all()


def test_pages_of_a_file_keep_their_bytes_when_it_changes(mapped, file, different):
    """A merged page has no tie to the file left; it was private before, too."""
    one = mapped()
    one.rows[2:5] = written = different(3)
    sksm.merge_range(*one.where)
    assert (one.rows[2:5] == written).all()
    assert (one.rows[:2] == file[1][:2]).all()


def test_a_page_cleared_by_the_program_stays_zero(mapped, file):
    """Not the file's page comes back, but zeros."""
    one = mapped()
    one.rows[3] = 0
    report = sksm.merge_range(*one.where)
    assert report.zero == 1
    assert not one.rows[3].any()
    assert (one.rows[2] == file[1][2]).all()
    assert (one.rows[4] == file[1][4]).all()


def test_gaps_of_clean_pages_stay_the_files(mapped, file, different, area):
    """Pages between merged ones are not covered by the pool's mapping."""
    one, plain = mapped(), area(PAGES + 1)
    plain.rows[:] = different(PAGES + 1)
    sksm.merge_range(*plain.where)
    expected = file[1].copy()
    for page in (1, 3, 5):
        one.rows[page] = expected[page] = plain.rows[page]
    report = sksm.merge_range(*one.where)
    assert report.merged == 3
    assert (one.rows == expected).all()
    shown = [m.inode for m in one.mappings() if m.span.start == one.part(2, 3).start]
    assert shown == [os.fstat(file[0]).st_ino]


def test_code_of_a_library_is_left_to_the_page_cache():
    """Nothing of a loaded library was written, but for its relocations."""
    from sksm.linux import maps  # noqa: PLC0415

    text = next(
        m
        for m in maps.every_mapping("self")
        if "libc.so" in m.path and m.prot & libc.PROT_EXEC
    )
    report = sksm.merge_range(text.span.start, text.span.size // 2 // 4096 * PAGE_SIZE)
    assert report.reasons == {pages.UNWRITTEN_FILE: report.scanned}
