"""The exchange, as `AddressSpace` promises it, here and in another process."""

import errno
import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest

from sksm.engines.pool import PoolEngine
from sksm.linux import libc, maps
from sksm.linux.features import Feature
from sksm.pages import is_pool, why_not
from sksm.pipeline import merge_all
from sksm.process import CHANGED, DONE, Exchange, other
from sksm.process.comparing import Comparison
from sksm.process.local import ThisProcess
from sksm.process.other import UNPROTECTED, OtherProcess
from sksm.spans import PAGE_SIZE, Span
from sksm.store.local import LocalStore
from sksm.store.pool import POOL_NAME
from tests.conftest import frames
from tests.process import obey
from tests.process.subject import RW, Piece, Subject, state_of

pytestmark = [
    pytest.mark.needs(
        Feature.PTRACE_SEIZE, Feature.PIDFD_GETFD, Feature.USERFAULTFD_WP
    ),
    pytest.mark.usefixtures("patient"),
]

PAGES = 8
MADV_HUGEPAGE = 14
HUGE = 2 << 20


class Here:
    """This process, told what to do as any other."""

    pid = os.getpid()

    @staticmethod
    def do(line):
        return eval(line, vars(obey))


@pytest.fixture
def there(worker):
    return Subject(worker)


@pytest.fixture(params=["here", "there"])
def subject(request):
    """This process, and another one."""
    return Here() if request.param == "here" else request.getfixturevalue("there")


@pytest.fixture
def space(subject):
    """Its memory, as the engines see it."""
    kind = ThisProcess() if isinstance(subject, Here) else OtherProcess(subject.pid)
    with kind as opened:
        yield opened


@pytest.fixture
def other_space(there):
    with OtherProcess(there.pid) as opened:
        yield opened


@pytest.fixture
def data(different):
    """Pages, no two alike, as bytes."""
    return different(PAGES).tobytes()


@pytest.fixture
def pool(data):
    """A pool that holds `data` from its first slot on."""
    fd = os.memfd_create(POOL_NAME)
    os.write(fd, data)
    yield fd
    os.close(fd)


def content_of(pool):
    return os.pread(pool, PAGES * PAGE_SIZE, 0)


def page(data, index):
    return data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]


def exchange(space, pool, piece, *items):
    """Exchange with writers held off, as the engines have it."""
    with space.protected(piece.span):
        return space.exchange(pool, items)


def whole(piece, slot=0, **how):
    return Exchange(piece.span, how.pop("prot", RW), slot, **how)


def shown(piece):
    """For each mapping of it: protection, and whether it is the pool's."""
    return [(m.prot, is_pool(m)) for m in piece.mappings()]


# -- flags


def flags_of(piece):
    """The flags of each mapping of it."""
    return [m.flags for m in maps.mappings(piece.pid, piece.span)]


@pytest.mark.parametrize("own", [(), ((2, 3),)], ids=["all", "but one"])
def test_memory_that_no_child_gets_stays_so(there, other_space, pool, data, own):
    """QEMU has its guests' memory so: merged, cleared and given back."""
    piece = Piece(there, PAGES)
    piece.advise(libc.MADV_DONTFORK)
    piece.write(data)
    item = whole(piece, own=own, not_forked=True)
    assert exchange(other_space, pool, piece, item) == [DONE]
    assert shown(piece) == [(RW, True)]
    assert all("dc" in flags for flags in flags_of(piece))
    other_space.privatise(piece.span, RW, not_forked=True)
    assert not any(pooled for _, pooled in shown(piece))
    assert all("dc" in flags for flags in flags_of(piece))
    assert piece.read() == data


def test_zeros_that_no_child_gets_stay_so(there, other_space, pool):
    """Where the pool's pages were before, and the zero page is now."""
    zeros = bytes(PAGES * PAGE_SIZE)
    os.pwrite(pool, zeros, 0)
    piece = Piece(there, PAGES)
    piece.advise(libc.MADV_DONTFORK)
    piece.write(zeros)
    exchange(other_space, pool, piece, whole(piece, not_forked=True))
    item = whole(piece, None, anonymous=False, not_forked=True)
    assert exchange(other_space, pool, piece, item) == [DONE]
    assert shown(piece) == [(RW, False)]
    assert all("dc" in flags for flags in flags_of(piece))
    assert piece.read() == zeros


DEEDS = {
    "nothing": lambda piece, part: None,
    "not forked": lambda piece, part: piece.advise(libc.MADV_DONTFORK, *part),
    "not dumped": lambda piece, part: piece.advise(libc.MADV_DONTDUMP, *part),
    "wiped": lambda piece, part: piece.advise(libc.MADV_WIPEONFORK, *part),
    "locked": lambda piece, part: piece._call("mlock", piece.part(*part)),
    "read-only": lambda piece, part: piece.protect(libc.PROT_READ, *part),
    "unmapped": lambda piece, part: piece.unmap(*part),
}


@pytest.mark.parametrize("part", [(0, PAGES), (2, 5), (3, 4)], ids=["all", "some", "1"])
@pytest.mark.parametrize("deed", DEEDS)
def test_trying_tells_what_smaps_tells(monkeypatch, there, other_space, deed, part):
    """Of a large process, where reading smaps takes long; and changes nothing."""
    piece = Piece(there, PAGES)
    piece.write(b"x" * PAGES * PAGE_SIZE)
    DEEDS[deed](piece, part)
    before = maps.mappings(piece.pid, piece.span)

    monkeypatch.setattr(other, "_MANY_PAGES", 0)
    tried = other_space._tried(piece.span)
    found = other_space.mappings(piece.span)

    assert bool(tried) == (bool(before) and all(m.span.pages > 1 for m in before))
    assert [(m.span, m.prot, why_not(m)) for m in found] == [
        (m.span, m.prot, why_not(m)) for m in before
    ]
    assert maps.mappings(piece.pid, piece.span) == before


# -- comparing


@pytest.mark.check
def test_comparisons_that_are_under_way_together_do_not_mix(memory, different):
    """Each says of its own pages whether they equal theirs, large or small."""
    some = memory(2048)
    some.rows[:] = different(2048)
    pool = os.memfd_create(POOL_NAME)
    os.write(pool, some.rows)
    mem = os.open("/proc/self/mem", os.O_RDONLY)
    sizes = [512, 1, 700, 2, 300, 33] * 20
    firsts = np.random.default_rng(3).integers(0, 2048 - 700, len(sizes)).tolist()
    comparison = Comparison(mem, pool)
    for shift in (0, 1):  # 1: each page beside another's twin
        begun = [
            comparison.begin([whole_of(some, first, size, first + shift)])
            for first, size in zip(firsts, sizes, strict=True)
        ]
        assert [equal() for equal in begun] == [[not shift]] * len(sizes)
    comparison.close()
    os.close(mem)
    os.close(pool)


def whole_of(some, first, count, slot):
    start = some.address + first * PAGE_SIZE
    return Exchange(Span(start, start + count * PAGE_SIZE), RW, slot)


# -- equal pages


@pytest.mark.check
def test_equal_pages_are_replaced_and_read_the_same(subject, space, pool, data):
    """The range is the pool's now, as private and as writable as before."""
    piece = Piece(subject, PAGES)
    piece.write(data)
    assert exchange(space, pool, piece, whole(piece)) == [DONE]
    assert shown(piece) == [(RW, True)]
    assert piece.read() == data


@pytest.mark.root
def test_replaced_pages_share_the_pools_frames(subject, space, pool, data):
    """Those of any other range of them, until one is written to."""
    one, two = Piece(subject, PAGES), Piece(subject, PAGES)
    for piece in (one, two):
        piece.write(data)
        exchange(space, pool, piece, whole(piece))
    with mmap.mmap(pool, len(data), flags=mmap.MAP_SHARED) as view:
        rows = np.frombuffer(view, np.uint8)
        rows.sum()
        start = rows.ctypes.data
        shared = frames(type(one.span)(start, start + len(data)))
        del rows
    assert (one.frames() == shared).all()
    assert (two.frames() == shared).all()
    one.write(b"x", 3)
    assert (one.frames() == shared).tolist() == [at != 3 for at in range(PAGES)]
    assert (two.frames() == shared).all()


@pytest.mark.check
def test_a_write_afterwards_is_the_writers_own(subject, space, pool, data):
    """Neither the pool nor another range sees it."""
    one, two = Piece(subject, PAGES), Piece(subject, PAGES)
    for piece in (one, two):
        piece.write(data)
        assert exchange(space, pool, piece, whole(piece)) == [DONE]
    one.write(b"mine", 2)
    expected = bytearray(data)
    expected[2 * PAGE_SIZE : 2 * PAGE_SIZE + 4] = b"mine"
    assert one.read() == expected
    assert two.read() == data
    assert os.pread(pool, len(data), 0) == data


def test_slots_anywhere_in_the_pool_can_be_taken(subject, space, pool, data):
    """Each exchange names its own."""
    piece = Piece(subject, PAGES)
    order = [5, 0, 7, 7, 2]
    piece.write(b"".join(page(data, slot) for slot in order))
    items = [
        Exchange(piece.part(at, at + 1), RW, slot) for at, slot in enumerate(order)
    ]
    assert exchange(space, pool, piece, *items) == [DONE] * 5
    expected = b"".join(page(data, slot) for slot in order)
    assert piece.read(0, 5) == expected


@pytest.mark.check
@pytest.mark.parametrize(
    "where", [0, PAGES * PAGE_SIZE // 2 + 77, PAGES * PAGE_SIZE - 1]
)
def test_one_byte_that_differs_keeps_the_range_as_it_is(
    subject, space, pool, data, where
):
    """Wherever it is; the mapping, too, and nothing of the attempt is left."""
    piece = Piece(subject, PAGES)
    changed = bytearray(data)
    changed[where] ^= 1
    piece.write(changed)
    count = space.count_mappings(piece.span)
    assert exchange(space, pool, piece, whole(piece)) == [CHANGED]
    assert shown(piece) == [(RW, False)]
    assert piece.read() == changed
    assert space.count_mappings(piece.span) == count


@pytest.mark.check
def test_each_exchange_has_its_own_verdict(subject, space, pool, data):
    """One that fails stops none of the others; more of them than fit in one stop."""
    piece, count = Piece(subject, 150), 150
    content = [page(data, at % PAGES) for at in range(count)]
    for at in range(0, count, 3):
        content[at] = content[at][:-1] + bytes([content[at][-1] ^ 1])
    piece.write(b"".join(content))
    items = [Exchange(piece.part(at, at + 1), RW, at % PAGES) for at in range(count)]
    verdicts = exchange(space, pool, piece, *items)
    assert verdicts == [DONE if at % 3 else CHANGED for at in range(count)]
    assert piece.read() == b"".join(content)


def test_nothing_to_exchange_is_done_at_once(space, pool):
    """An empty list has no verdicts."""
    assert space.exchange(pool, []) == []


# -- pages of its own


def test_pages_of_its_own_keep_their_bytes(subject, space, pool, data):
    """Although the mapping covers them."""
    piece = Piece(subject, PAGES)
    mixed = bytearray(data)
    mixed[0 : 2 * PAGE_SIZE] = os.urandom(2 * PAGE_SIZE)
    mixed[4 * PAGE_SIZE : 5 * PAGE_SIZE] = os.urandom(PAGE_SIZE)
    piece.write(mixed)
    item = whole(piece, own=((0, 2), (4, 5)))
    assert exchange(space, pool, piece, item) == [DONE]
    assert shown(piece) == [(RW, True)]
    assert piece.read() == mixed
    assert os.pread(pool, len(data), 0) == data


@pytest.mark.root
def test_pages_of_its_own_have_frames_of_their_own(subject, space, pool, data):
    """The others share theirs."""
    one, two = Piece(subject, PAGES), Piece(subject, PAGES)
    for piece in (one, two):
        piece.write(data)
    exchange(space, pool, one, whole(one))
    exchange(space, pool, two, whole(two, own=((3, 5),)))
    same = (one.frames() == two.frames()).tolist()
    assert same == [at not in (3, 4) for at in range(PAGES)]


# -- zeros


@pytest.mark.parametrize("pages", [1, 70])
def test_pages_of_zeros_become_the_kernels_own(subject, space, pool, pages):
    """In a mapping that is no other than before, and can be written to."""
    piece = Piece(subject, pages)
    piece.write(b"\1" * (pages * PAGE_SIZE))
    piece.write(bytes(pages * PAGE_SIZE))
    item = whole(piece, slot=None)
    assert exchange(space, pool, piece, item) == [DONE]
    assert shown(piece) == [(RW, False)]
    if os.getuid() == 0:
        assert len(set(piece.frames())) == 1
    piece.write(b"x", pages - 1)
    assert piece.read() == bytes((pages - 1) * PAGE_SIZE) + b"x".ljust(PAGE_SIZE, b"\0")


def test_a_page_that_is_nearly_zero_stays(subject, space, pool):
    """Its last byte counts."""
    piece = Piece(subject, 3)
    content = bytes(3 * PAGE_SIZE - 1) + b"\1"
    piece.write(content)
    assert exchange(space, pool, piece, whole(piece, slot=None)) == [CHANGED]
    assert piece.read() == content


def test_zeros_in_a_merged_range_become_the_kernels_own(subject, space, pool, data):
    """Dropping a page there would bring the pool's back: it is mapped anew."""
    piece = Piece(subject, PAGES)
    piece.write(data)
    assert exchange(space, pool, piece, whole(piece)) == [DONE]
    piece.write(bytes(PAGE_SIZE), 3)
    item = Exchange(piece.part(3, 4), RW, None, anonymous=False)
    assert exchange(space, pool, piece, item) == [DONE]
    expected = data[: 3 * PAGE_SIZE] + bytes(PAGE_SIZE) + data[4 * PAGE_SIZE :]
    assert piece.read() == expected
    assert shown(piece) == [(RW, True), (RW, False), (RW, True)]


# -- protections


READ, EXECUTE = libc.PROT_READ, libc.PROT_READ | libc.PROT_EXEC


@pytest.mark.parametrize("own", [(), ((2, 4),)], ids=["all", "gap"])
@pytest.mark.parametrize("prot", [READ, EXECUTE], ids=["read", "execute"])
def test_the_protection_stays_what_it_is(subject, space, pool, prot, own):
    """Also where a gap has to be written to first."""
    data = content_of(pool)
    piece = Piece(subject, PAGES)
    piece.write(data)
    piece.protect(prot)
    assert exchange(space, pool, piece, whole(piece, prot=prot, own=own)) == [DONE]
    assert shown(piece) == [(prot, True)]
    assert piece.read() == data


# -- memory that changes between plan and exchange


def test_memory_that_is_gone_is_an_errno(subject, space, pool, data):
    """Not a crash, and the rest is as it was."""
    piece = Piece(subject, PAGES)
    piece.write(data)
    item = whole(piece)
    with space.protected(piece.span):
        piece.unmap(3, 5)
        (verdict,) = space.exchange(pool, [item])
    assert verdict in (errno.EFAULT, errno.ENOENT, CHANGED)
    assert piece.read(0, 3) == data[: 3 * PAGE_SIZE]
    assert piece.read(5) == data[5 * PAGE_SIZE :]
    assert not any(is_pool(m) for m in piece.mappings())


@pytest.mark.parametrize("how", ["mprotect", "shared memory", "a file"])
def test_a_mapping_that_is_another_by_now_is_left_alone(
    there, other_space, pool, how, tmp_path
):
    """Though its bytes are equal: what it is could not be kept."""
    data = content_of(pool)
    piece = Piece(there, PAGES)
    piece.write(data)
    item = whole(piece)
    with other_space.protected(piece.span):
        if how == "mprotect":
            piece.protect(READ)
        elif how == "shared memory":
            piece.map(flags=libc.MAP_SHARED | libc.MAP_ANONYMOUS)
            piece.write(data)
        else:
            path = tmp_path / "file"
            path.write_bytes(data)
            fd = there.do(f"os.open({os.fspath(path)!r}, os.O_RDONLY)")
            piece.map(flags=libc.MAP_PRIVATE, fd=fd)
        before = piece.mappings()
        assert other_space.exchange(pool, [item]) == [CHANGED]
        assert piece.mappings() == before
    assert piece.read() == data


def test_a_part_that_is_another_by_now_keeps_all_as_it_is(
    there, other_space, pool, data
):
    """One page in the middle is enough."""
    piece = Piece(there, PAGES)
    piece.write(data)
    item = whole(piece)
    with other_space.protected(piece.span):
        piece.protect(READ, 4, 5)
        assert other_space.exchange(pool, [item]) == [CHANGED]
    assert [prot for prot, _ in shown(piece)] == [RW, READ, RW]
    assert piece.read() == data


def test_a_process_that_ends_is_gone(there, other_space, pool, data):
    """Before the first exchange, and afterwards."""
    piece = Piece(there, PAGES)
    piece.write(data)
    items = [Exchange(piece.part(at, at + 1), RW, at) for at in range(2)]
    with other_space.protected(piece.span):
        assert other_space.exchange(pool, items[:1]) == [DONE]
        there.process.kill()
        with pytest.raises(ProcessLookupError):
            other_space.exchange(pool, items[1:])


# -- huge pages


@pytest.mark.parametrize("part", ["whole", "few"])
def test_huge_pages_are_replaced_as_others_are(subject, space, part):
    """Whole ones, and a few pages of one; the rest keeps its bytes."""
    pages = 2 * HUGE // PAGE_SIZE
    piece = Piece(subject, pages)
    first = -piece.start % HUGE // PAGE_SIZE
    piece.advise(MADV_HUGEPAGE)
    data = bytes(range(256)) * 16 * (pages - first)
    subject.do(
        f"write({piece.part(first).start}, bytes(range(256)) * {len(data) // 256})"
    )
    smaps = Path(f"/proc/{subject.pid}/smaps").read_text()
    found = re.search(
        rf"^{piece.start:x}-.*?^AnonHugePages: *(\d+)", smaps, re.M | re.S
    )
    if not int(found[1]):
        pytest.skip("the kernel gave no huge page")
    fd = os.memfd_create(POOL_NAME)
    os.write(fd, data[:HUGE])
    try:
        if part == "whole":
            spans = halves(piece.part(first, first + HUGE // PAGE_SIZE))
        else:
            spans = [piece.part(first + 3, first + 7)]
        items = [Exchange(span, RW, 0) for span in spans]
        assert exchange(space, fd, piece, *items) == [DONE] * len(spans)
        assert piece.read(first) == data
    finally:
        os.close(fd)


def halves(span):
    middle = span.start + span.pages // 2 * PAGE_SIZE
    return type(span)(span.start, middle), type(span)(middle, span.stop)


# -- giving back


@pytest.mark.parametrize("prot", [RW, READ, EXECUTE], ids=["write", "read", "execute"])
def test_privatised_memory_is_anonymous_again(subject, space, pool, data, prot):
    """Same bytes, same protection, no trace of the pool; the rest stays shared."""
    piece = Piece(subject, PAGES)
    piece.write(data)
    piece.protect(prot)
    assert exchange(space, pool, piece, whole(piece, prot=prot)) == [DONE]
    space.privatise(piece.part(2, 5), prot)
    assert shown(piece) == [(prot, True), (prot, False), (prot, True)]
    assert piece.read() == data
    space.privatise(piece.span, prot)
    assert {pooled for _, pooled in shown(piece)} == {False}
    assert {prot for prot, _ in shown(piece)} == {prot}
    assert piece.read() == data


@pytest.mark.root
def test_privatised_pages_have_frames_of_their_own(subject, space, pool, data):
    """Each its own."""
    one, two = Piece(subject, PAGES), Piece(subject, PAGES)
    for piece in (one, two):
        piece.write(data)
        exchange(space, pool, piece, whole(piece))
    space.privatise(one.span, RW)
    assert not np.isin(one.frames(), two.frames()).any()
    assert len(set(one.frames())) == PAGES


@pytest.mark.check
def test_privatised_memory_reads_as_zeros_once_it_is_dropped(
    subject, space, pool, data
):
    """As its allocator may expect."""
    piece = Piece(subject, PAGES)
    piece.write(data)
    exchange(space, pool, piece, whole(piece))
    space.privatise(piece.span, RW)
    piece.advise(libc.MADV_DONTNEED, 1, 3)
    assert piece.read() == page(data, 0) + bytes(2 * PAGE_SIZE) + data[3 * PAGE_SIZE :]


def test_memory_that_is_gone_cannot_be_privatised(there, other_space):
    """An error, and not of the process."""
    piece = Piece(there, PAGES)
    piece.write(b"x" * PAGES * PAGE_SIZE)
    piece.unmap()
    with pytest.raises(OSError, match=r"."):
        other_space.privatise(piece.span, RW)
    assert there.do("6 * 7") == 42


# -- files


@pytest.fixture
def file_piece(there, data, tmp_path):
    """A private mapping of a file of other bytes, into which `data` was written."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PAGES * PAGE_SIZE))
    fd = there.do(f"os.open({os.fspath(path)!r}, os.O_RDONLY)")
    piece = Piece(there, PAGES, flags=libc.MAP_PRIVATE, fd=fd)
    piece.write(data)
    return piece


def merged(space, piece):
    store = LocalStore()
    try:
        return merge_all(space, [piece.span], engine=PoolEngine(store))
    finally:
        store.close()


def test_written_pages_of_a_file_merge_if_nobody_can_write(
    there, other_space, file_piece, data
):
    """Relocated data of libraries, for example."""
    file_piece.protect(READ)
    report = merged(other_space, file_piece)
    assert report.stored == PAGES - 1  # the last page of a mapping is left
    assert {prot for prot, _ in shown(file_piece)} == {READ}
    assert file_piece.read() == data


def test_written_pages_of_a_file_are_refused_if_somebody_can(
    there, other_space, file_piece, data
):
    """They cannot be protected, and the threads may run if we are killed."""
    before = file_piece.mappings()
    report = merged(other_space, file_piece)
    assert report.reasons[UNPROTECTED] == PAGES - 1
    assert report.refused == report.scanned == PAGES
    assert file_piece.mappings() == before
    assert file_piece.read() == data


# -- leaving


def test_after_an_exchange_only_the_pages_are_different(there, pool, data):
    """No descriptor stays, no stub, and no mapping but the pool's."""
    piece = Piece(there, PAGES)
    piece.write(data)
    before = state_of(there.rests().pid)
    with OtherProcess(there.pid) as space:
        assert exchange(space, pool, piece, whole(piece)) == [DONE]
    after = state_of(there.pid)
    for state in (before, after):
        state["mappings"] = [
            line
            for line in state["mappings"]
            if int(line.split("-")[0], 16) not in range(piece.start, piece.span.stop)
        ]
    assert after == before
