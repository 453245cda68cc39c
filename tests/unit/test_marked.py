"""Who has memory marked for KSM: asked of the kernel in three ways, by its age."""

import errno
import mmap
import os

import pytest

from sksm.linux import ksm

pytestmark = pytest.mark.skipif(not ksm.FOLDER.exists(), reason="no KSM here")


def raise_not_found(_):
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def without_mergeable(found):
    return {name: value for name, value in found.items() if name != "ksm_mergeable"}


@pytest.fixture(params=["as it is", "before 6.15", "before 6.1"])
def kernel(request, monkeypatch):
    """A kernel of some age."""
    real = ksm.stat
    if request.param == "before 6.15":
        monkeypatch.setattr(ksm, "stat", lambda pid: without_mergeable(real(pid)))
    if request.param == "before 6.1":
        monkeypatch.setattr(ksm, "stat", raise_not_found)


def test_memory_is_marked_when_its_owner_has_marked_it(kernel):
    """And no longer when that is gone."""
    assert not ksm.is_marked(os.getpid())
    with mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE) as some:
        some.madvise(mmap.MADV_MERGEABLE)
        assert ksm.is_marked(os.getpid())
    assert not ksm.is_marked(os.getpid())


def test_without_ksm_nothing_is(monkeypatch, tmp_path):
    """Whatever the process."""
    monkeypatch.setattr(ksm, "FOLDER", tmp_path / "none")
    assert not ksm.is_marked(os.getpid())


def test_a_process_that_has_ended_is_an_error():
    """As with all that is asked of it."""
    with pytest.raises(OSError, match="No such"):
        ksm.is_marked(2**22 - 1)
