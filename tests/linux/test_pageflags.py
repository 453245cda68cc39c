"""What the kernel tells of frames, and whether it can be believed."""

import numpy as np
import pytest

from sksm.linux import ksm, pageflags

pytestmark = [
    pytest.mark.check,
    pytest.mark.machine,
    pytest.mark.root,
    pytest.mark.skipif(not ksm.FOLDER.exists(), reason="the kernel has no KSM"),
]


@pytest.fixture(autouse=True)
def _asked_anew():
    pageflags.tell_ksm.cache_clear()
    yield
    pageflags.tell_ksm.cache_clear()


def test_a_kernel_that_calls_all_pages_ksms_is_found_out(monkeypatch):
    """As Linux 6.12 does: then ksmd is out of reach, and says why."""
    every = np.uint64(pageflags.KSM)
    monkeypatch.setattr(pageflags, "of_frames", lambda frames: frames * 0 + every)
    assert not pageflags.tell_ksm()
    assert ksm.obstacle() == ksm.UNTOLD


def test_a_page_of_our_own_is_none_of_ksms(monkeypatch):
    """Where the kernel tells them apart."""
    monkeypatch.setattr(pageflags, "of_frames", lambda frames: frames * 0)
    assert pageflags.tell_ksm()
    assert ksm.obstacle() != ksm.UNTOLD


def test_it_looks_at_a_real_page(monkeypatch):
    """Anonymous and private, that is, and in memory."""
    seen = []
    real = pageflags.of_frames
    monkeypatch.setattr(
        pageflags, "of_frames", lambda frames: seen.append(real(frames)) or seen[-1]
    )
    pageflags.tell_ksm()
    anonymous = 1 << 12  # KPF_ANON, include/uapi/linux/kernel-page-flags.h
    assert int(seen[0][0]) & anonymous
