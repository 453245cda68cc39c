"""Watched processes that the kernel merges by its own call, MADV_MERGE."""

import pytest

from sksm.engines import choice, kernel
from sksm.engines.ksm import Task, work
from sksm.linux import ksm, libc
from sksm.linux.features import Feature, missing
from sksm.process import DONE
from sksm.process.other import OtherProcess
from sksm.report import MergeReport
from sksm.scanner import in_place
from sksm.scanner.watched import Watched
from sksm.spans import PAGE_SIZE, Span
from tests.scanner.test_in_place import group_of, shared
from tests.scanner.test_scanner import SAME, inside

pytestmark = [
    pytest.mark.root,
    pytest.mark.needs(
        Feature.USERFAULTFD_WP_ASYNC, Feature.PTRACE_SEIZE, Feature.PIDFD_GETFD
    ),
    pytest.mark.usefixtures("runtime", "ksmd_rests"),
    pytest.mark.skipif(not ksm.FOLDER.exists(), reason="the kernel has no KSM"),
]


def mappings_of(holder):
    """Count those that its pages lie in."""
    with OtherProcess(holder.pid) as space:
        return space.count_mappings(holder.span)


@pytest.fixture(params=["kernel", "emulated"], autouse=True)
def call(request, monkeypatch, tmp_path):
    """A kernel with MADV_MERGE; or this one, where ksmd does what it would."""
    if request.param == "kernel":
        if reason := missing(Feature.MADV_MERGE):
            pytest.skip(reason)
        return
    if reason := ksm.obstacle():
        pytest.skip(reason)

    marked = set()

    class Emulated(kernel.KernelEngine):
        def share(self, space, batch):
            assert set(space.advise(batch.spans, libc.MADV_MERGEABLE)) == {DONE}
            marked.add(space.pid)
            return MergeReport()

    def settle(member, numbers, *, done):
        work(tmp_path / ksm.STATE_NAME, Task(marked, 1 << 30), 20.0)
        settled(member, numbers, done=done)

    settled = Watched.settle
    monkeypatch.setattr(Watched, "settle", settle)
    real = choice.obstacle
    monkeypatch.setattr(
        choice, "obstacle", lambda name: None if name == choice.KERNEL else real(name)
    )
    monkeypatch.setattr(in_place, "KernelEngine", Emulated)


def test_twins_are_merged_where_they_are(world, holder):
    """What has no twin is left alone."""
    one, two = holder([*SAME, *range(200, 300)]), holder([*SAME, *range(300, 400)])
    sums = one.ask("sum"), two.ask("sum")
    world.epochs(7)
    assert group_of(world, one.pid) == group_of(world, two.pid) == choice.KERNEL
    assert shared(one.pid, inside(one)) == shared(two.pid, inside(two)) == 100
    assert shared(one.pid, one.span) == 100
    assert world.member(one.pid).pages.merged() >= 100
    assert (one.ask("sum"), two.ask("sum")) == sums


@pytest.mark.parametrize("call", ["kernel"], indirect=True)  # ksmd's marks do split
def test_no_mapping_is_split(world, holder):
    """Where only part of it has twins: nothing is marked."""
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


def test_if_a_stranger_comes_the_pool_takes_over(world, holder, monkeypatch):
    """The call would share with him, too: it looks in KSM's trees."""
    one, two = holder(SAME), holder(SAME)
    world.epochs(4)
    assert group_of(world, one.pid) == choice.KERNEL
    monkeypatch.setattr(choice, "stranger", lambda *_: "somebody else is there")
    world.epochs(10)
    assert group_of(world, one.pid) == group_of(world, two.pid) == choice.POOL
    assert shared(one.pid, one.span) == 0
    assert world.member(one.pid).pages.merged() >= 100


def test_who_insists_shares_with_strangers(world, holder, monkeypatch):
    """That KSM knows no users is known to who asks for it by name."""
    world.scanner.merge_by(choice.KERNEL)
    monkeypatch.setattr(
        choice, "stranger", lambda admits, _: "" if admits(1) else "somebody else"
    )
    one, two = holder(SAME), holder(SAME)
    world.epochs(7)

    assert group_of(world, one.pid) == choice.KERNEL
    assert shared(one.pid, inside(one)) == shared(two.pid, inside(two)) == 100
