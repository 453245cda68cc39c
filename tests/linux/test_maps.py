"""/proc/PID/maps and smaps, read and counted."""

import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksm.linux import libc, maps
from sksm.spans import PAGE_SIZE, Span

pytestmark = pytest.mark.check


def count_within(span):
    with open("/proc/self/maps", "rb", buffering=0) as table:
        return maps.count_within(table.fileno(), span)


EVERYWHERE = Span(0, 1 << 47)
LINE = "7f00deadb000-7f00deadd000 {perms} 00003000 fe:0a 1234    {path}"


def parsed(perms="rw-p", path=""):
    return maps._parse(LINE.format(perms=perms, path=path), [])


@pytest.mark.parametrize(
    ("perms", "prot", "shared"),
    [("r-xp", 5, False), ("-w-s", 2, True), ("---p", 0, False), ("rwxs", 7, True)],
)
def test_permissions_are_read_letter_by_letter(perms, prot, shared):
    """Shared is the fourth letter; the "s" of no other place."""
    mapping = parsed(perms)
    assert (mapping.prot, mapping.shared) == (prot, shared)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "",
            "[heap]",
            "[anon:my name]",
            "/lib/x.so",
            "/a b/c  d",
            "/memfd:x (deleted)",
        ),
        "/tmp/gone (deleted)",
    ],
)
def test_paths_are_taken_to_the_end_of_the_line(path):
    """With their spaces, and with what the kernel puts behind."""
    assert parsed(path=path).path == path


def test_numbers_are_read_in_their_bases():
    """Addresses, offset and device in hex, the inode in decimal."""
    mapping = parsed()
    assert mapping.span == Span(0x7F00DEADB000, 0x7F00DEADD000)
    assert (mapping.offset, mapping.device, mapping.inode) == (0x3000, "fe:0a", 1234)


@pytest.fixture
def file_mapping(tmp_path):
    """Map a file of three pages under a given name; then delete it if asked."""
    held = []

    def make(name, *, deleted=False):
        path = tmp_path / name
        path.write_bytes(b"x" * 3 * PAGE_SIZE)
        with path.open("rb") as file:
            held.append(
                mmap.mmap(file.fileno(), 2 * PAGE_SIZE, prot=1, offset=PAGE_SIZE)
            )
            status = os.fstat(file.fileno())
        if deleted:
            path.unlink()
        return path, status

    yield make
    for one in held:
        one.close()


@pytest.mark.parametrize("name", ["plain", "with  two spaces", "ümlaut", "new\nline"])
@pytest.mark.parametrize("deleted", [False, True])
def test_a_mapped_file_is_found_whatever_its_name(file_mapping, name, deleted):
    """By device and inode; the name is only for people."""
    path, status = file_mapping(name, deleted=deleted)
    found = [m for m in maps.every_mapping("self") if m.inode == status.st_ino]
    assert [m.span.size for m in found] == [2 * PAGE_SIZE]
    assert found[0].offset == PAGE_SIZE
    assert found[0].path.endswith(" (deleted)") == deleted
    if name.isascii() and "\n" not in name:
        assert found[0].path.removesuffix(" (deleted)") == str(path)
    exact = [m for m in maps.mappings("self", found[0].span) if m.flags]
    assert [m.span for m in exact] == [found[0].span]


@pytest.fixture(scope="module")
def striped():
    """Forty pages in stretches of differing protection, holes between some."""
    # Far below all else: the kernel looks for room from the top, and what it put into
    # a hole here would come and go, and be unmapped with the rest.
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_FIXED_NOREPLACE
    address = libc.mmap(1 << 36, 40 * PAGE_SIZE, 3, flags, -1, 0)
    for page in range(0, 40, 3):
        libc.mprotect(address + page * PAGE_SIZE, PAGE_SIZE, libc.PROT_READ)
    for page in (0, 7, 8, 20, 39):
        libc.munmap(address + page * PAGE_SIZE, PAGE_SIZE)
    yield address
    libc.munmap(address, 40 * PAGE_SIZE)


@given(st.lists(st.integers(1, 39), min_size=2, max_size=2, unique=True).map(sorted))
def test_all_ways_to_list_a_range_agree(striped, bounds):
    """By smaps, by maps and by query: the same mappings, whole, in order."""
    span = Span(*(striped + page * PAGE_SIZE for page in bounds))
    near = [
        m
        for m in maps.every_mapping("self")
        if m.span.start < span.stop and m.span.stop > span.start
    ]
    listed = maps.mappings("self", span)
    assert [(m.span, m.prot, m.path) for m in listed] == [
        (m.span, m.prot, m.path) for m in near
    ]
    assert count_within(span) == len(near)


def test_counting_without_the_query_gives_the_same(striped, monkeypatch):
    """Before Linux 6.11 the ioctl is ENOTTY."""
    span = Span(striped, striped + 40 * PAGE_SIZE)
    expected = len(maps.mappings("self", span))
    asked = []

    def refuse(*_):
        asked.append(1)
        raise OSError(25, "ENOTTY")

    monkeypatch.setattr(maps.fcntl, "ioctl", refuse)
    assert count_within(span) == expected
    assert asked


def test_every_mapping_has_flags_in_smaps_and_a_place_in_maps():
    """Reading in pieces loses no record, however long the table is."""
    by_smaps = maps.mappings("self", EVERYWHERE)
    starts = {m.span.start for m in maps.every_mapping("self")}
    assert all(m.flags for m in by_smaps)
    assert len(by_smaps) > 50
    # Reading may itself have moved the heap: all but a few are in both.
    assert len({m.span.start for m in by_smaps} ^ starts) < 10


def test_records_are_found_wherever_the_reads_cut_them(tmp_path, monkeypatch):
    """A record, a line, a word may be cut by the end of a read."""
    records = [f"{at:x} head\nField: {at}\nVmFlags: rd wr{at}" for at in range(9)]
    table = tmp_path / "smaps"
    table.write_text("\n".join(records) + "\n")
    for size in range(1, 60):
        monkeypatch.setattr(maps, "_READ_BYTES", size)
        found = maps._blocks(str(table), b"\nVmFlags:")
        assert [block.decode() for block in found] == records
