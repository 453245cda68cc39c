"""Memory that is left alone: refused, counted under its reason, and intact."""

import ctypes
import errno
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

import sksm
from sksm import pages
from sksm.buffers import PARTLY_OUTSIDE
from sksm.linux import libc, maps, userfaultfd
from sksm.process import local
from sksm.spans import PAGE_SIZE
from tests.memory import PRIVATE, RW
from tests.support import in_child

pytestmark = pytest.mark.usefixtures("here")

PAGES = 6
NR_MSEAL = 462  # since Linux 6.10
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")


def refused(report):
    """The reasons, after a look at whether all pages were refused."""
    assert report.scanned == report.refused
    return report.reasons


def assert_left_alone(one, reason):
    before, mappings = one.rows.copy(), one.mappings()
    report = sksm.merge_range(*one.where)
    assert refused(report) == {reason: len(one.rows)}
    assert (one.rows == before).all()
    assert [m.path for m in one.mappings()] == [m.path for m in mappings]


def test_shared_anonymous_memory_is_refused(area, different):
    """What others see would no longer be what is written here."""
    one = area(PAGES, flags=libc.MAP_SHARED | libc.MAP_ANONYMOUS)
    one.rows[:] = different(1)
    assert_left_alone(one, "shared mapping")


def test_a_shared_file_is_refused(area, different):
    """A memfd that somebody else may map as well."""
    fd = os.memfd_create("shared")
    try:
        os.ftruncate(fd, PAGES * PAGE_SIZE)
        one = area(PAGES, flags=libc.MAP_SHARED, fd=fd)
    finally:
        os.close(fd)
    one.rows[:] = different(1)
    assert_left_alone(one, "shared mapping")


ADVICE = {
    "MADV_DONTDUMP": (16, "left out of core dumps (MADV_DONTDUMP)"),
    "MADV_DONTFORK": (10, "not copied on fork (MADV_DONTFORK)"),
    "MADV_WIPEONFORK": (18, "wiped on fork (MADV_WIPEONFORK)"),
}


@pytest.mark.parametrize("name", ADVICE)
def test_memory_with_a_nature_of_its_own_is_refused(area, different, name):
    """A mapping of the pool in its place would not keep that nature."""
    advice, reason = ADVICE[name]
    one = area(PAGES)
    one.rows[:] = different(1)
    one.advise(advice)
    assert_left_alone(one, reason)


def test_locked_memory_is_refused(area, different):
    """MAP_FIXED would lose the lock."""
    one = area(PAGES)
    one.rows[:] = different(1)
    if ctypes.CDLL(None).mlock(ctypes.c_void_p(one.address), one.size):
        pytest.skip("mlock is not allowed here (RLIMIT_MEMLOCK)")
    assert_left_alone(one, "locked memory")


def test_sealed_memory_is_refused(different):
    """mseal(2) promises that it stays; the test's process keeps it for ever."""
    held = mmap.mmap(-1, PAGES * PAGE_SIZE, flags=PRIVATE)
    rows = np.frombuffer(held, np.uint8).reshape(PAGES, PAGE_SIZE)
    rows[:] = different(1)
    where = rows.ctypes.data, rows.nbytes
    # In a child, which takes the sealed mapping with it.
    pid = os.fork()
    if pid == 0:
        try:
            libc.raw_syscall(NR_MSEAL, *map(ctypes.c_ulong, (*where, 0)))
            if ctypes.get_errno() == errno.ENOSYS:
                os._exit(2)
            from sksm.engines.pool import PoolEngine  # noqa: PLC0415
            from sksm.pipeline import merge  # noqa: PLC0415
            from sksm.process.local import ThisProcess  # noqa: PLC0415
            from sksm.spans import Span  # noqa: PLC0415
            from sksm.store.local import LocalStore  # noqa: PLC0415

            span = Span(where[0], where[0] + where[1])
            report = merge(ThisProcess(), span, engine=PoolEngine(LocalStore()))
            os._exit(0 if refused(report) == {"sealed memory": PAGES} else 1)
        finally:
            os._exit(3)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 2:
        pytest.skip("this kernel has no mseal (before Linux 6.10)")
    assert code == 0


@pytest.mark.machine
@pytest.mark.root
def test_huge_tlb_pages_are_refused():
    """They come from a reserve that nothing would be given back to."""
    if not HUGE_PAGES.exists():
        pytest.skip("this kernel has no hugetlb (CONFIG_HUGETLBFS)")
    before = HUGE_PAGES.read_text()
    size = 2 << 20
    HUGE_PAGES.write_text(str(int(before) + 1))
    try:
        try:
            address = libc.mmap(None, size, RW, PRIVATE | 0x40000, -1, 0)
        except OSError as error:
            pytest.skip(f"no huge page to be had: {error.strerror}")
        try:
            ctypes.memset(address, 1, size)
            report = sksm.merge_range(address, size)
            assert refused(report) == {"huge TLB pages": size // PAGE_SIZE}
        finally:
            libc.munmap(address, size)
    finally:
        HUGE_PAGES.write_text(before)


def test_unreadable_memory_is_refused(area, different):
    """PROT_NONE: the program cannot read it, and so nobody compares it."""
    one = area(PAGES)
    one.rows[:] = different(1)
    one.protect(libc.PROT_NONE)
    report = sksm.merge_range(*one.where)
    one.protect(RW)
    assert refused(report) == {"no permission to read it": PAGES}
    assert (one.rows == one.rows[0]).all()


def test_the_stack_is_refused():
    """It is being written while the call runs."""
    stack = next(m for m in maps.every_mapping("self") if m.path == "[stack]")
    report = sksm.merge_range(stack.span.start, stack.span.size)
    (reason,) = refused(report)
    assert "stack" in reason


@pytest.mark.parametrize("name", ["[vdso]", "[vvar]"])
def test_mappings_of_the_kernel_are_refused(name):
    """Whatever flag or name tells them."""
    found = [m for m in maps.every_mapping("self") if m.path == name]
    for mapping in found:
        report = sksm.merge_range(mapping.span.start, mapping.span.size)
        assert len(refused(report)) == 1


def test_untouched_pages_are_refused_and_stay_untouched(area, different):
    """Looking at a page must not be what brings it into being."""
    one = area(10)
    one.rows[2:4] = different(2)

    report = sksm.merge_range(*one.where)

    assert report.stored == 2
    assert report.reasons == {pages.UNTOUCHED: 7, pages.LAST_PAGE: 1}
    again = sksm.merge_range(*one.where)
    assert (again.already, again.refused) == (2, 8)  # the split made a last page


def test_the_last_page_of_a_mapping_is_refused(area, different):
    """And the one before it is not."""
    one, two = area(4), area(4)
    one.rows[:] = two.rows[:] = different(4)
    sksm.merge_range(*one.where)
    report = sksm.merge_range(*two.where)
    assert (report.merged, report.reasons) == (3, {pages.LAST_PAGE: 1})
    assert [m.path[:7] for m in two.mappings()] == ["/memfd:", ""]


def test_pages_partly_outside_an_object_are_refused(memory, different):
    """Their other bytes are somebody else's."""
    one = memory(5)
    one.rows[:] = different(5)
    inside = one.rows.reshape(-1)[100:-100]
    report = sksm.merge(inside)
    assert (report.stored, report.reasons) == (3, {PARTLY_OUTSIDE: 2})


def test_an_object_smaller_than_a_page_is_refused(memory):
    """Nothing of it is a whole page: counted, not an error."""
    report = sksm.merge(memory(1).rows[0, 10:50])
    assert refused(report) == {PARTLY_OUTSIDE: 1}


def test_memory_watched_by_another_userfaultfd_is_refused(area, different):
    """A mapping in its place would be watched no longer."""
    try:
        fd = userfaultfd.create()
    except OSError as error:
        pytest.skip(f"no userfaultfd: {error.strerror}")
    try:
        one = area(PAGES)
        one.rows[:] = different(1)
        userfaultfd.register(fd, one.span)
        report = sksm.merge_range(*one.where)
        assert refused(report)[pages.WATCHED] >= PAGES - 1
        assert report.scanned == PAGES
        assert (one.rows == one.rows[0]).all()
    finally:
        os.close(fd)


@pytest.mark.check
def test_refusals_do_not_keep_the_rest_from_merging(area, different):
    """One range over mappings of many kinds."""
    one, two = area(12), area(12)
    one.rows[:] = two.rows[:] = different(12)
    sksm.merge_range(*one.where)
    two.advise(16, 2, 4)
    two.protect(libc.PROT_NONE, 6, 7)

    report = sksm.merge_range(*two.where)
    two.protect(RW, 6, 7)

    assert report.reasons == {
        ADVICE["MADV_DONTDUMP"][1]: 2,
        "no permission to read it": 1,
        pages.LAST_PAGE: 3,  # before each, and at the end
    }
    assert report.merged == 6
    assert report.scanned == 12
    assert (one.rows == two.rows).all()


@pytest.mark.root  # who has no limit of locked memory
def test_where_all_new_memory_is_locked_nothing_is_merged(memory, different):
    """The pool's pages would be locked with it; the reason says so."""

    def lock_and_merge():
        everything = ctypes.CDLL(None)
        some = memory(8)
        some.rows[:] = different(8)
        content = some.rows.copy()
        with local.ThisProcess() as space:
            assert space.objection() is None
        assert everything.mlockall(2) == 0  # MCL_FUTURE
        assert list(sksm.merge(some.rows).reasons) == [local.LOCKS_ALL]
        assert (some.rows == content).all()
        assert everything.munlockall() == 0
        with local.ThisProcess() as space:
            assert space.objection() is None

    in_child(lock_and_merge)


def test_where_locked_memory_has_no_room_the_reason_is_the_same(monkeypatch):
    """mmap(2) gives EAGAIN then."""

    def refuse(*_):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(local.libc, "mmap", refuse)
    assert local.ThisProcess().objection() == local.LOCKS_ALL
