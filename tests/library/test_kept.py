"""What a merge keeps: protection, execution, content, the mappings around."""

import ctypes
import faulthandler
import os
import signal

import numpy as np
import pytest

import sksm
from sksm import pages
from sksm.linux import libc
from sksm.spans import PAGE_SIZE
from tests.memory import RW

pytestmark = pytest.mark.usefixtures("here", "threads")

# A function that returns 42, and one that returns 43.
ANSWER = {
    "x86_64": (b"\xb8\x2a\0\0\0\xc3", b"\xb8\x2b\0\0\0\xc3"),
    "aarch64": (
        b"\x40\x05\x80\x52\xc0\x03\x5f\xd6",
        b"\x60\x05\x80\x52\xc0\x03\x5f\xd6",
    ),
}[os.uname().machine]


@pytest.fixture
def twins(area, different):
    """Give `twins(n)`: two areas of the same n pages and one more."""

    def make(size):
        one, two = area(size + 1), area(size + 1)
        one.rows[:] = two.rows[:] = different(size + 1)
        return one, two

    return make


def merged_part(one):
    return one.where[0], one.where[1] - PAGE_SIZE


@pytest.mark.check
@pytest.mark.parametrize("prot", [1, 3, 5, 7], ids=["r--", "rw-", "r-x", "rwx"])
def test_protection_is_kept(twins, prot):
    """Stored pages, merged pages, and both again after a second merge."""
    one, two = twins(4)
    content = one.rows.copy()
    for each in (one, two):
        each.protect(prot)
    first = sksm.merge_range(*merged_part(one))
    second = sksm.merge_range(*merged_part(two))
    third = sksm.merge_range(*merged_part(two))

    assert (first.stored, second.merged, third.already) == (4, 4, 4)
    for each in (one, two):
        assert {m.prot for m in each.mappings()} == {prot}
        assert (each.rows == content).all()


def test_read_only_memory_stays_unwritable(twins):
    """A write is SIGSEGV, as it was before."""
    one, _ = twins(4)
    one.protect(libc.PROT_READ)
    assert sksm.merge_range(*merged_part(one)).stored == 4
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        ctypes.memset(one.address, 1, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV


def test_code_still_runs_after_its_pages_were_merged(twins):
    """Called through ctypes before, after, and after another merge of it."""
    one, two = twins(2)
    for each in (one, two):
        for row, code in zip(each.rows, ANSWER, strict=False):
            row[: len(code)] = np.frombuffer(code, np.uint8)
        each.protect(libc.PROT_READ | libc.PROT_EXEC)
    functions = [
        ctypes.CFUNCTYPE(ctypes.c_int)(each.address + page * PAGE_SIZE)
        for each in (one, two)
        for page in (0, 1)
    ]
    assert [function() for function in functions] == [42, 43, 42, 43]
    reports = [sksm.merge_range(*merged_part(each)) for each in (one, two)]
    assert [r.stored + r.merged for r in reports] == [2, 2]
    assert [function() for function in functions] == [42, 43, 42, 43]


def test_different_protections_in_one_range_are_kept_apart(twins):
    """Each mapping gets its own back."""
    one, two = twins(9)
    for each in (one, two):
        each.protect(libc.PROT_READ, 3, 6)
    sksm.merge_range(*one.where)
    report = sksm.merge_range(*two.where)
    assert [m.prot for m in two.mappings() if m.span.size > PAGE_SIZE] == [3, 1, 3]
    assert report.merged == 7
    assert report.reasons == {pages.LAST_PAGE: 3}
    assert (one.rows == two.rows).all()


def test_memory_can_be_protected_and_written_after_a_merge(twins):
    """mprotect on a merged range works as on any other."""
    one, two = twins(4)
    content = one.rows.copy()
    for each in (one, two):
        sksm.merge_range(*merged_part(each))
    two.protect(libc.PROT_READ)
    two.protect(RW)
    two.rows[1] = 9
    assert (one.rows == content).all()
    content[1] = 9
    assert (two.rows == content).all()


@pytest.mark.check
def test_nothing_outside_the_range_is_touched(area, different):
    """Neighbouring pages stay what and where they are."""
    one, two = area(9), area(9)
    one.rows[:] = two.rows[:] = different(9)
    content = one.rows.copy()
    sksm.merge_range(*one.where)
    part = two.part(3, 6)
    report = sksm.merge_range(part.start, part.size)
    assert (report.scanned, report.merged) == (3, 3)
    shown = [(m.span, bool(m.inode)) for m in two.mappings()]
    assert shown == [
        (two.part(0, 3), False),
        (two.part(3, 6), True),
        (two.part(6, 9), False),
    ]
    assert (two.rows == content).all()


@pytest.mark.check
@pytest.mark.root
def test_a_write_unmerges_the_page_of_the_writer_only(area, different):
    """Three share; one writes; the other two go on sharing all."""
    three = [area(5) for _ in range(3)]
    content = different(5)
    for each in three:
        each.rows[:] = content
        sksm.merge_range(*each.where)
    first, second, third = three
    second.rows[2, 7] ^= 1
    assert (first.frames() == third.frames()).tolist() == [True] * 4 + [False]
    shared = (first.frames() == second.frames()).tolist()
    assert shared == [True, True, False, True, False]
    assert (first.rows == content).all()
    assert (third.rows == content).all()
    content[2, 7] ^= 1
    assert (second.rows == content).all()
    assert sksm.merge_range(*second.where).stored == 1
