"""What every engine keeps, on all of them that are here. Frames are the oracle."""

import os

import numpy as np
import pytest

from sksm.engines.kernel import KernelEngine
from sksm.engines.ksm import KsmEngine, Task, work
from sksm.engines.pool import PoolEngine
from sksm.linux import ksm, libc
from sksm.linux.features import Feature, missing
from sksm.pipeline import merge_all
from sksm.process.local import ThisProcess
from sksm.report import OUTCOMES
from sksm.spans import PAGE_SIZE
from tests.conftest import frames

pytestmark = [
    pytest.mark.machine,
    pytest.mark.root,
    pytest.mark.usefixtures("ksmd_rests"),
    pytest.mark.skipif(not ksm.FOLDER.exists(), reason="the kernel has no KSM"),
]
PAGES = 64
ALL_THERE_IS = 1 << 30  # pages for ksmd to merge: until it finds no more
PATIENCE = 60.0  # seconds that ksmd gets on a busy machine


class Emulated(ThisProcess):
    """A kernel with MADV_MERGE, as far as its callers see: ksmd does it."""

    def __init__(self, state):
        super().__init__()
        self._state = state

    def advise(self, spans, advice):
        assert advice == libc.MADV_MERGE
        verdicts = super().advise(spans, libc.MADV_MERGEABLE)
        work(self._state, Task({self.pid}, ALL_THERE_IS), 20.0)
        return verdicts


@pytest.fixture(params=["pool", "ksm", "kernel", "kernel, emulated"])
def merge(request, here, tmp_path):
    """Give `merge(*areas)`: by each engine; its report."""
    name, state = request.param, tmp_path / ksm.STATE_NAME
    if name == "kernel" and (reason := missing(Feature.MADV_MERGE)):
        pytest.skip(reason)

    def run(*areas):
        engine = {
            "pool": lambda: PoolEngine(here),
            "ksm": lambda: KsmEngine(state, PATIENCE),
        }.get(name, KernelEngine)()
        emulated = name.endswith("emulated")
        spans = sorted((area.span for area in areas), key=lambda span: span.start)
        with Emulated(state) if emulated else ThisProcess() as space:
            report = merge_all(space, spans, engine=engine)
            for other in engine.finish().values():
                report += other
        assert report.scanned == sum(span.pages for span in spans)
        assert report.scanned == sum(getattr(report, name) for name in OUTCOMES)
        return report

    before = ksm._knobs()
    yield run
    assert ksm._knobs() == before


@pytest.fixture
def twins(area, different):
    """Two areas of the same bytes; the last page of each has no twin.

    It is the last of its mapping, and the pool leaves it alone.
    """
    one, two = area(PAGES), area(PAGES)
    one.rows[:] = two.rows[:] = different(PAGES)
    one.rows[-1], two.rows[-1] = different(2)
    return one, two


@pytest.mark.check
def test_equal_pages_share_a_frame_until_one_is_written(merge, twins):
    """The promise of the whole system."""
    one, two = twins
    before = one.rows.copy(), two.rows.copy()
    report = merge(one, two)
    assert report.merged == PAGES - 1
    assert (one.frames() == two.frames()).tolist() == [True] * (PAGES - 1) + [False]
    two.rows[3, 0] ^= 1
    same = (one.frames() == two.frames()).tolist()
    assert same == [n not in (3, PAGES - 1) for n in range(PAGES)]
    assert (one.rows == before[0]).all()
    two.rows[3, 0] ^= 1
    assert (two.rows == before[1]).all()


@pytest.mark.check
def test_it_merges_again_what_was_written(merge, twins):
    """Three times over: written pages find back to their twins."""
    one, two = twins
    for _ in range(3):
        merge(one, two)
        assert (one.frames()[:-1] == two.frames()[:-1]).all()
        two.rows[:, 5] ^= 1
        two.rows[:, 5] ^= 1
        assert not (one.frames() == two.frames()).any()


def test_a_second_merge_changes_nothing(merge, twins):
    """Merged memory is found merged."""
    merge(*twins)
    before = [some.frames() for some in twins]
    report = merge(*twins)
    assert report.already == 2 * (PAGES - 1)
    assert report.merged == report.stored == report.zero == 0
    assert all((a == b.frames()).all() for a, b in zip(before, twins, strict=True))


def test_zeros_become_the_kernels_page(merge, area, zero_frame):
    """All but the last page, which the pool leaves alone."""
    one = area(PAGES)
    one.rows[:] = 0
    report = merge(one)
    assert report.zero >= PAGES - 1
    assert (one.frames()[:-1] == zero_frame).all()
    one.rows[0] = 1
    assert one.rows[0].all()
    assert not one.rows[1:].any()


def test_protection_stays(merge, twins):
    """Memory that cannot be written to stays so."""
    one, two = twins
    one.protect(libc.PROT_READ)
    report = merge(one, two)
    assert report.merged == PAGES - 1
    assert {mapping.prot for mapping in one.mappings()} == {libc.PROT_READ}


@pytest.mark.check
def test_a_child_has_the_bytes_of_its_parent(merge, twins):
    """Forked after the merge, each writes for itself."""
    one, two = twins
    before = one.rows.copy()
    merge(one, two)
    pid = os.fork()
    if pid == 0:
        right = (one.rows == before).all()
        one.rows[:] = 9
        os._exit(0 if right and (one.rows == 9).all() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert (one.rows == before).all()


def test_shared_memory_is_refused(merge, area):
    """With its reason."""
    shared = area(4, flags=libc.MAP_SHARED | libc.MAP_ANONYMOUS)
    shared.rows[:] = 1
    assert merge(shared).reasons == {"shared mapping": 4}


def test_memory_never_touched_stays_so(merge, area):
    """It takes no memory, and should not begin to."""
    some = area(PAGES)
    some.rows[0] = np.arange(PAGE_SIZE) % 251
    report = merge(some)
    assert sum(report.reasons.values()) >= PAGES - 1
    assert not frames(some.span)[1:].any()
