"""Kernels that lack something merge all the same."""

import errno
import os

import pytest

import sksm
from sksm.linux import maps, pagemap, userfaultfd
from tests.memory import another_thread


def lacking(code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.fixture(params=["PAGEMAP_SCAN", "PROCMAP_QUERY", "userfaultfd", "all"])
def lack(request, monkeypatch):
    """Take a feature away, or all of them at once."""
    wanted = request.param
    if wanted in ("PAGEMAP_SCAN", "all"):
        monkeypatch.setattr(pagemap, "scan", lacking(errno.ENOTTY))
    if wanted in ("PROCMAP_QUERY", "all"):
        monkeypatch.setattr(maps, "query", lacking(errno.ENOTTY))
    if wanted in ("userfaultfd", "all"):
        monkeypatch.setattr(userfaultfd, "create", lacking(errno.EPERM))
    with another_thread():
        yield wanted


@pytest.mark.check
@pytest.mark.usefixtures("here", "lack")
def test_memory_merges_and_stays_intact(area, different):
    """First sight, second sight, and both once more."""
    content = different(21)
    content[7] = 0
    one, two = area(21), area(21)
    one.rows[:] = two.rows[:] = content
    first = sksm.merge_range(*one.where)
    second = sksm.merge_range(*two.where)
    assert (first.stored, first.zero) == (19, 1)
    assert (second.merged, second.zero) == (19, 1)
    for each in (one, two):
        again = sksm.merge_range(*each.where)
        assert again.already >= 18
        assert again.stored + again.unique + again.changed == 0
        assert (each.rows == content).all()
    two.rows[3] = 5
    content_of_two = two.rows.copy()
    assert sksm.merge_range(*two.where).stored == 1
    assert (two.rows == content_of_two).all()
    assert sksm.unmerge_range(*two.where) > 0
    assert (two.rows == content_of_two).all()
    assert (one.rows == content).all()


@pytest.mark.usefixtures("here", "lack")
def test_refusals_are_the_same(area, different):
    """Flags and untouched pages are seen by other means."""
    one = area(12)
    one.rows[:6] = different(6)
    one.advise(16, 2, 4)
    report = sksm.merge_range(*one.where)
    assert report.reasons["left out of core dumps (MADV_DONTDUMP)"] == 2
    assert report.scanned == 12
    assert report.stored == 3  # 0, 4 and 5; page 1 is the last of its mapping
