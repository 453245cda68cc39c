"""The ksm engine on memory of this process: ksmd is borrowed, and the truth counted."""

import contextlib
import ctypes
import os
import signal
import time

import numpy as np
import pytest

from sksm.engines import ksm as engine_module
from sksm.engines.ksm import KsmEngine
from sksm.errors import SksmError
from sksm.linux import ksm, libc, pageflags
from sksm.pipeline import merge_all
from sksm.process.local import ThisProcess
from tests.conftest import poll
from tests.puppets import Obedient
from tests.rows import Memory, content

pytestmark = [
    pytest.mark.machine,
    pytest.mark.root,
    pytest.mark.skipif(not ksm.FOLDER.exists(), reason="the kernel has no KSM"),
]
PAGES = 64


@pytest.fixture
def state(tmp_path):
    return tmp_path / ksm.STATE_NAME


@pytest.fixture(autouse=True)
def _knobs_stay():
    before = ksm._knobs()
    yield
    assert ksm._knobs() == before


@pytest.fixture
def twins(area, different):
    """Two areas of the same bytes, of which the last pages are zeros."""
    one, two = area(PAGES), area(PAGES)
    one.rows[:-4] = two.rows[:-4] = different(PAGES - 4)
    one.rows[-4:] = two.rows[-4:] = 0
    yield one, two
    for some in (one, two):
        some.advise(libc.MADV_UNMERGEABLE)


def merge(state, *areas, seconds=None):
    engine = KsmEngine(state, seconds)
    spans = sorted((area.span for area in areas), key=lambda span: span.start)
    with ThisProcess() as space:
        report = merge_all(space, spans, engine=engine)
        for other in engine.finish().values():
            report += other
    return report


def by_ksm(area):
    """Say of each page whether KSM has merged it; zeros apart."""
    flags = pageflags.of_frames(area.frames().astype(np.uint64))
    return (flags & np.uint64(pageflags.KSM) != 0).tolist()


def test_equal_pages_share_a_frame_until_one_is_written(twins, state, zero_frame):
    """Frame numbers are the oracle, and the report agrees with them."""
    one, two = twins
    before = one.rows.copy()
    report = merge(state, one, two)
    assert (report.merged, report.stored, report.zero) == (PAGES - 4, PAGES - 4, 8)
    assert report.scanned == 2 * PAGES
    assert by_ksm(one) == [True] * (PAGES - 4) + [False] * 4
    assert (one.frames() == two.frames()).all()
    assert (one.frames()[-4:] == zero_frame).all()
    two.rows[3, 0] ^= 1
    assert (one.frames() == two.frames()).tolist() == [n != 3 for n in range(PAGES)]
    assert (one.rows == before).all()


def test_a_second_merge_changes_nothing(twins, state):
    """Merged pages are counted as such."""
    merge(state, *twins)
    before = [some.frames() for some in twins]
    report = merge(state, *twins)
    assert (report.already, report.scanned) == (2 * PAGES, 2 * PAGES)
    assert all((a == b.frames()).all() for a, b in zip(before, twins, strict=True))


def test_what_has_no_twin_stays(area, different, state):
    """Also the last page of a mapping is merged: it stays where it is."""
    one, two = area(PAGES), area(PAGES)
    one.rows[:], two.rows[:] = different(PAGES), different(PAGES)
    two.rows[-1] = one.rows[-1]
    report = merge(state, one, two)
    assert (report.merged, report.stored, report.unique) == (1, 1, 2 * PAGES - 2)
    assert one.frames()[-1] == two.frames()[-1]
    assert by_ksm(one).count(True) == 1


@pytest.mark.check
def test_freed_pages_read_as_zeros(twins, state):
    """What allocators count on, and the pool cannot give."""
    one, _ = twins
    merge(state, *twins)
    one.advise(libc.MADV_DONTNEED, 0, 8)
    assert not one.rows[:8].any()


def test_locked_memory_is_merged_and_stays_locked(twins, state):
    """Nothing is replaced, so no flag is lost."""
    one, two = twins
    lock = ctypes.CDLL(None).mlock
    assert lock(ctypes.c_void_p(one.span.start), ctypes.c_size_t(one.span.size)) == 0
    report = merge(state, one, two)
    assert report.merged >= PAGES - 4
    assert all("lo" in mapping.flags for mapping in one.mappings())


def test_shared_memory_is_refused(area, state):
    """With the reason that the pool has, too."""
    shared = area(4, flags=libc.MAP_SHARED | libc.MAP_ANONYMOUS)
    shared.rows[:] = 1
    report = merge(state, shared)
    assert report.reasons == {"shared mapping": 4}


def test_time_that_is_up_is_told(twins, state, monkeypatch):
    """Nothing is lost, and nothing counted that is not so."""
    monkeypatch.setattr(ksm, "at_work", lambda *_: contextlib.nullcontext())
    report = merge(state, *twins, seconds=0.05)
    assert report.reasons == {engine_module.UNFINISHED: 2 * PAGES}
    assert report.scanned == 2 * PAGES


def test_another_command_that_has_ksmd_is_waited_for(
    twins, state, monkeypatch, puppets
):
    """For a while; then it is an error that says so, and the pages are as they were."""
    monkeypatch.setattr(engine_module, "_PATIENCE_SECONDS", 0.05)
    before = [some.rows.copy() for some in twins]
    with ksm.borrowed(state), pytest.raises(SksmError, match="has ksmd"):
        merge(state, *twins)
    assert all((a == b.rows).all() for a, b in zip(before, twins, strict=True))
    with ksm.borrowed(state):
        one = puppets(Other, state)
        one.tell("merge")
        time.sleep(0.1)
    one.hear()


def test_an_administrators_ksmd_goes_on_as_it_was(twins, state):
    """It is only borrowed upward, and never told to un-merge."""
    keep = state.with_name("kept.json")
    with ksm.borrowed(keep):
        ksm.tune("pages_to_scan", "50")
        ksm.tune("sleep_millisecs", "77")
        ksm.tune("run", "1")
        before = ksm._knobs()
        report = merge(state, *twins)
        assert ksm._knobs() == before
        assert report.merged + report.zero + report.stored == 2 * PAGES


class Other(Obedient):
    """Holds twins, and has ksmd merge them."""

    def __init__(self, state):
        self.state, self.twins = state, (Memory(2000), Memory(2000))
        for some in self.twins:
            some.rows[:] = content(1, 2000)

    def merge(self):
        merge(self.state, *self.twins)

    def merge_for_ever(self):
        while True:
            self.merge()
            for some in self.twins:
                some.rows[:, 0] += 1


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.limit(600)
def test_knobs_are_back_after_a_kill_at_any_time(puppets, state, kills):
    """The next command gives them back, whatever was under way."""
    before, chance = ksm._knobs(), np.random.default_rng(kills)
    caught = 0
    for _ in range(kills):
        one = puppets(Other, state)
        one.tell("merge_for_ever")
        poll(state.exists)
        signal.sigtimedwait([], chance.uniform(0, 0.05))
        one.end()
        caught += ksm._knobs() != before
        ksm.repair(state)
        assert ksm._knobs() == before
        assert not state.exists()
    assert caught, "never in the middle"


def test_only_root_may_steer_ksmd(tmp_path):
    """Others are told so."""
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        os._exit("only root" not in (ksm.obstacle() or ""))
    assert os.waitpid(pid, 0)[1] == 0
    assert ksm.obstacle() is None


def test_pages_others_have_merged_stay_merged(twins, state, puppets, tmp_path):
    """KSM's other users see that ksmd was at work, and nothing else."""
    one = puppets(Other, tmp_path / "other.json")
    one.merge()
    merged = ksm.merged_pages(one.pid)
    assert merged == 4000
    merge(state, *twins)
    assert ksm.merged_pages(one.pid) == merged
