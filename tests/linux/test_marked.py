"""Who has memory marked for KSM: asked of the kernel in three ways, by its age."""

import errno
import os

import pytest

from sksm.linux import ksm, libc
from tests.process.subject import Piece, Subject

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(not ksm.FOLDER.exists(), reason="no KSM here"),
]


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


def test_memory_is_marked_when_its_owner_has_marked_it(kernel, worker):
    """And no longer when that is gone."""
    # A process of its own: what other tests merged in this one, KSM may still count.
    owner = Subject(worker)
    piece = Piece(owner, 256)
    assert not ksm.is_marked(owner.pid)
    piece.advise(libc.MADV_MERGEABLE)
    assert ksm.is_marked(owner.pid)
    piece.unmap()
    assert not ksm.is_marked(owner.pid)


def test_without_ksm_nothing_is(monkeypatch, tmp_path):
    """Whatever the process."""
    monkeypatch.setattr(ksm, "FOLDER", tmp_path / "none")
    assert not ksm.is_marked(os.getpid())


def test_a_process_that_has_ended_is_an_error():
    """As with all that is asked of it."""
    with pytest.raises(OSError, match="No such"):
        ksm.is_marked(2**22 - 1)
