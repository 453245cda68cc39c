"""Watched processes that ksmd merges, and when it is set to work."""

import subprocess

import pytest

from sksm.engines import choice, frames
from sksm.linux import ksm, libc
from sksm.linux.features import Feature
from sksm.process import pages_of
from sksm.process.other import OtherProcess
from sksm.scanner import in_place
from sksm.scanner.scanner import Target
from sksm.scanner.watched import FEW_PAGES
from sksm.spans import PAGE_SIZE, Span
from tests.commands.conftest import PROGRAM
from tests.conftest import poll
from tests.other.holder import Holder
from tests.scanner.test_scanner import SAME, inside

pytestmark = [
    pytest.mark.root,
    pytest.mark.needs(
        Feature.USERFAULTFD_WP_ASYNC, Feature.PTRACE_SEIZE, Feature.PIDFD_GETFD
    ),
    pytest.mark.usefixtures("runtime", "ksmd_rests"),
    pytest.mark.skipif(not ksm.FOLDER.exists(), reason="the kernel has no KSM"),
]


@pytest.fixture
def world(world, monkeypatch):
    """A scanner that thinks little of ksmd's time."""
    if reason := ksm.obstacle():
        pytest.skip(reason)
    monkeypatch.setattr(in_place, "_PAGES_A_SECOND", 1.0)
    return world


@pytest.fixture
def holder(holder):
    """Give `holder(kinds)`: a process that marked these pages for KSM, watched."""

    def start(kinds):
        one = holder(kinds)
        with OtherProcess(one.pid) as space:
            assert space.advise([one.span], libc.MADV_MERGEABLE) == [0]
        return one

    return start


class Ksmd:
    """What it was set to do. It does nothing."""

    def __init__(self):
        self.tasks = []
        self.comes_to_the_end = True

    def work(self, _state, task, _seconds):
        self.tasks.append(task)
        return self.comes_to_the_end


@pytest.fixture
def ksmd(monkeypatch):
    """A ksmd that only takes notes."""
    found = Ksmd()
    monkeypatch.setattr(in_place, "work", found.work)
    return found


def shared(pid, span):
    """Count the pages that KSM has merged."""
    with OtherProcess(pid) as space:
        found = frames.shared_pages(space, pages_of([span]))
    return int(found.shared.sum() + found.zero.sum())


def group_of(world, pid):
    (found,) = (key for key, one in world.scanner.groups.items() if pid in one.members)
    return found[1]


def test_memory_that_is_marked_for_ksm_is_merged_by_ksmd(world, holder):
    """With as many mappings as before, and every knob as it was."""
    knobs = ksm._knobs()
    one, two = holder([*SAME, 0, *range(200, 300)]), holder([*SAME, *range(300, 400)])
    sums = one.ask("sum"), two.ask("sum")
    with OtherProcess(one.pid) as space:
        mappings = space.count_mappings(one.span)
    world.epochs(4)
    assert shared(one.pid, one.span) == 0
    world.epochs(3)
    assert group_of(world, one.pid) == group_of(world, two.pid) == choice.KSM
    assert shared(one.pid, inside(one)) == shared(two.pid, inside(two)) == 100
    assert shared(one.pid, one.span) == 101
    assert world.member(one.pid).pages.merged() >= 101
    assert (one.ask("sum"), two.ask("sum")) == sums
    assert ksm._knobs() == knobs
    with OtherProcess(one.pid) as space:
        assert space.count_mappings(one.span) == mappings


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


def test_memory_that_nobody_marked_is_marked_where_it_has_twins(worker, world):
    """When somebody insists on ksmd: as where the pool is not safe."""
    world.scanner.merge_by(choice.KSM)
    one = Holder(worker, [*SAME, *[None] * 2048, *range(200, 210)])
    two = Holder(worker, SAME)
    world.targets[one.pid] = Target()
    world.targets[two.pid] = Target()
    world.epochs(7)
    assert shared(one.pid, inside(one)) == shared(two.pid, inside(two)) == 100
    end = Span(one.span.stop - 3 * PAGE_SIZE, one.span.stop)
    with OtherProcess(one.pid) as space:
        found = space.mappings(Span(one.span.start, one.span.start + PAGE_SIZE))
        assert ksm.MARK in found[0].flags
        assert all(ksm.MARK not in each.flags for each in space.mappings(end))


def test_who_comes_later_is_merged_with_what_is_merged(world, holder):
    """Nothing else is equal to its pages that is not merged."""
    _ = holder(SAME), holder(SAME)
    world.epochs(7)
    three = holder(SAME)
    world.epochs(7)
    assert shared(three.pid, inside(three)) == 100


def test_if_a_stranger_comes_the_pool_takes_over(world, holder, ksmd, monkeypatch):
    """ksmd would share with him, too: nobody tells it to."""
    one, two = holder(SAME), holder(SAME)
    world.epochs(4)
    assert group_of(world, one.pid) == choice.KSM
    monkeypatch.setattr(choice, "stranger", lambda *_: "somebody else is there")
    world.epochs(10)
    assert ksmd.tasks == []
    assert group_of(world, one.pid) == group_of(world, two.pid) == choice.POOL
    assert world.member(one.pid).pages.merged() >= 100
    assert world.scanner.refused == {}


def test_what_ksmd_has_no_time_for_is_gone_on_with(world, holder, ksmd):
    """The same task, until it is done; then what is left is left alone for a while."""
    _ = holder(SAME), holder(SAME)
    ksmd.comes_to_the_end = False
    world.epochs(8)
    assert len(ksmd.tasks) > 1
    assert all(task is ksmd.tasks[0] for task in ksmd.tasks)
    ksmd.comes_to_the_end = True
    world.epochs(1)
    count = len(ksmd.tasks)
    world.epochs(3)
    assert len(ksmd.tasks) == count
    world.epochs(10)
    assert ksmd.tasks[-1] is not ksmd.tasks[0]


def test_few_pages_wait_until_it_is_worth_it_but_not_for_ever(
    world, holder, ksmd, monkeypatch
):
    """Unless ksmd worked long ago."""
    _ = holder(SAME), holder(SAME)
    world.epochs(7)
    assert len(ksmd.tasks) == 1
    (group,) = world.scanner.groups.values()
    group._seconds_a_page = 1e-3
    monkeypatch.setattr(in_place, "_PAGES_A_SECOND", 1000.0)
    some = [*range(500, 500 + FEW_PAGES)]
    _ = holder(some), holder(some)
    world.epochs(10)
    assert len(ksmd.tasks) == 1
    world.epochs(10, seconds=15.0)
    assert len(ksmd.tasks) > 1


def test_whoever_is_killed_while_ksmd_works_leaves_all_right(worker, runtime):
    """Programs have their bytes; the next command gives ksmd's knobs back."""
    if reason := ksm.obstacle():
        pytest.skip(reason)
    knobs = ksm._knobs()
    crew = [Holder(worker, [*range(1, 20_000)]) for _ in range(2)]
    sums = [one.ask("sum") for one in crew]
    for one in crew:
        with OtherProcess(one.pid) as space:
            assert space.advise([one.span], libc.MADV_MERGEABLE) == [0]
    named = [word for one in crew for word in ("--pid", str(one.pid))]
    command = [*PROGRAM, "watch", "--json", "--quiet-for", "1", "--cpu", "100", *named]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as scanner:
        poll(lambda: ksm.figures()["run"] == 1)
        scanner.kill()
    assert ksm.figures()["run"] == 1
    assert [one.ask("sum") for one in crew] == sums
    said = subprocess.run([*PROGRAM, "stat"], capture_output=True, text=True)
    assert "gave back the settings of ksmd" in said.stderr
    assert ksm._knobs() == knobs
    assert [one.ask("sum") for one in crew] == sums
