"""Watched processes whose pages the kernel merges: by MADV_MERGE, or by ksmd."""

import pytest

from sksm.engines import choice, frames, kernel
from sksm.engines.ksm import Task, work
from sksm.linux import ksm, libc
from sksm.linux.features import Feature, missing
from sksm.process import DONE, pages_of
from sksm.process.other import OtherProcess
from sksm.report import MergeReport
from sksm.scanner import in_place
from sksm.scanner.watched import Watched
from sksm.spans import PAGE_SIZE, Span
from tests.scanner.conftest import IN_PLACE
from tests.scanner.test_scanner import SAME, inside

pytestmark = IN_PLACE
EMULATED = "emulated"  # MADV_MERGE, by ksmd


@pytest.fixture(params=[choice.KSM, choice.KERNEL, EMULATED], autouse=True)
def way(request, monkeypatch, tmp_path):
    """How pages are merged; gives the engine that the scanner takes for it."""
    if request.param == choice.KERNEL:
        reason = missing(Feature.MADV_MERGE) or ksm.untold()
    else:
        reason = ksm.obstacle()
    if reason:
        pytest.skip(reason)
    if request.param == choice.KSM:
        cheap(monkeypatch)
        return choice.KSM
    if request.param == EMULATED:
        emulate(monkeypatch, tmp_path / ksm.STATE_NAME)
    return choice.KERNEL


def cheap(monkeypatch):
    """Have the scanner think little of ksmd's time."""
    monkeypatch.setattr(in_place, "_PAGES_A_SECOND", 1.0)


def emulate(monkeypatch, state):
    """Make a kernel with MADV_MERGE of this one, as far as the scanner sees."""
    marked = set()

    class Emulated(kernel.KernelEngine):
        def share(self, space, batch):
            assert set(space.advise(batch.spans, libc.MADV_MERGEABLE)) == {DONE}
            marked.add(space.pid)
            return MergeReport()

    def settle(member, numbers, *, done):
        work(state, Task(marked, 1 << 30), 20.0)
        settled(member, numbers, done=done)

    settled = Watched.settle
    monkeypatch.setattr(Watched, "settle", settle)
    real = choice.obstacle
    monkeypatch.setattr(
        choice, "obstacle", lambda name: None if name == choice.KERNEL else real(name)
    )
    monkeypatch.setattr(in_place, "KernelEngine", Emulated)


@pytest.fixture
def holder(holder, way):
    """Give `holder(kinds)`: a process that holds these pages for its way, watched."""

    def start(kinds):
        one = holder(kinds)
        return marked(one) if way == choice.KSM else one

    return start


def marked(holder):
    """Mark the pages of a process for KSM."""
    with OtherProcess(holder.pid) as space:
        assert space.advise([holder.span], libc.MADV_MERGEABLE) == [DONE]
    return holder


def shared(pid, span):
    """Count the pages that KSM has merged."""
    with OtherProcess(pid) as space:
        return int(frames.shared_pages(space, pages_of([span])).merged.sum())


def mappings_of(holder):
    """Count those that its pages lie in."""
    with OtherProcess(holder.pid) as space:
        return space.count_mappings(holder.span)


def group_of(world, pid):
    """Say by which engine a process is merged."""
    (found,) = (key for key, one in world.scanner.groups.items() if pid in one.members)
    return found[1]


def test_twins_are_merged_where_they_are(world, holder, way):
    """And zeros; what has no twin is left alone. Not before it is quiet."""
    one, two = holder([*SAME, 0, *range(200, 300)]), holder([*SAME, *range(300, 400)])
    sums = one.ask("sum"), two.ask("sum")
    world.epochs(4)
    assert shared(one.pid, one.span) == 0
    world.epochs(3)
    assert group_of(world, one.pid) == group_of(world, two.pid) == way
    assert shared(one.pid, inside(one)) == shared(two.pid, inside(two)) == 100
    assert shared(one.pid, one.span) == 101
    assert world.member(one.pid).pages.merged() >= 101
    assert (one.ask("sum"), two.ask("sum")) == sums


@pytest.mark.parametrize("way", [choice.KSM, choice.KERNEL], indirect=True)
def test_no_mapping_is_split(world, holder):
    """Where only part of it has twins. (Emulated, the marks do.)"""
    one, two = holder([*SAME, *range(200, 300)]), holder([*SAME, *range(300, 400)])
    before = mappings_of(one), mappings_of(two)
    world.epochs(7)
    assert shared(one.pid, one.span) == 100
    assert (mappings_of(one), mappings_of(two)) == before


def test_what_it_gained_is_told(world, holder):
    """As the kernel counts it."""
    crew = [holder(SAME) for _ in range(3)]
    world.epochs(7)
    (group,) = world.scanner.groups.values()
    for one in crew:
        assert group.merged_pages(world.member(one.pid)) == ksm.merged_pages(one.pid)
        assert ksm.merged_pages(one.pid) >= 100
    assert group.shared_bytes >= 100 * PAGE_SIZE


def test_a_write_unmerges_and_is_seen(world, holder):
    """The page waits for longer then, and the kernel's replacing is no write."""
    one, two = holder(SAME), holder(SAME)
    world.epochs(7)
    before = world.member(one.pid).unmerged
    for page in range(10):
        one.ask("put", page, 5000)
    world.epochs(2)
    assert world.member(one.pid).unmerged >= before + 10
    assert shared(one.pid, Span(one.page(0), one.page(10))) == 0
    assert shared(one.pid, Span(one.page(10), one.page(100))) == 90
    assert shared(two.pid, inside(two)) == 100


def test_who_comes_later_is_merged_with_what_is_merged(world, holder):
    """Nothing else is equal to its pages that is not merged."""
    _ = holder(SAME), holder(SAME)
    world.epochs(7)
    three = holder(SAME)
    world.epochs(7)
    assert shared(three.pid, inside(three)) == 100


def test_if_a_stranger_comes_the_pool_takes_over(world, holder, way, monkeypatch):
    """KSM would share with him, too: nobody tells it not to."""
    one, two = holder(SAME), holder(SAME)
    world.epochs(4)
    assert group_of(world, one.pid) == way
    monkeypatch.setattr(choice, "stranger", lambda *_: "somebody else is there")
    world.epochs(10)
    assert shared(one.pid, one.span) == 0
    assert group_of(world, one.pid) == group_of(world, two.pid) == choice.POOL
    assert world.member(one.pid).pages.merged() >= 100
    assert world.scanner.refused == {}


def test_who_insists_shares_with_strangers(world, holder, way, monkeypatch):
    """That KSM knows no users is known to who asks for it by name."""
    world.scanner.merge_by(way)
    monkeypatch.setattr(
        choice, "stranger", lambda admits, _: "" if admits(1) else "somebody else"
    )
    one, two = holder(SAME), holder(SAME)
    world.epochs(7)
    assert group_of(world, one.pid) == way
    assert shared(one.pid, inside(one)) == shared(two.pid, inside(two)) == 100
