"""Watched processes that ksmd merges, and when it is set to work."""

import subprocess

import pytest

from sksm.engines import choice
from sksm.linux import ksm
from sksm.process.other import OtherProcess
from sksm.scanner import in_place
from sksm.scanner.scanner import Target
from sksm.scanner.watched import FEW_PAGES
from sksm.spans import PAGE_SIZE, Span
from tests.commands.conftest import PROGRAM
from tests.conftest import poll
from tests.process.holder import Holder
from tests.scanner.conftest import IN_PLACE
from tests.scanner.test_in_place import cheap, marked, shared
from tests.scanner.test_scanner import SAME, inside

pytestmark = IN_PLACE


@pytest.fixture
def world(world, monkeypatch):
    """A scanner that thinks little of ksmd's time."""
    if reason := ksm.obstacle():
        pytest.skip(reason)
    cheap(monkeypatch)
    return world


@pytest.fixture
def holder(holder):
    """Give `holder(kinds)`: a process that marked these pages for KSM, watched."""
    return lambda kinds: marked(holder(kinds))


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


def test_every_knob_is_as_it_was(world, holder):
    """When it has merged what is marked."""
    knobs = ksm._knobs()
    one, _two = holder(SAME), holder(SAME)
    world.epochs(7)
    assert shared(one.pid, inside(one)) == 100
    assert ksm._knobs() == knobs


def test_memory_that_nobody_marked_is_marked_where_it_has_twins(puppets, world):
    """When somebody insists on ksmd: as where the pool is not safe."""
    world.scanner.merge_by(choice.KSM)
    far = [None] * 1024  # marks are for 2 MiB: no other mapping reaches into these
    one = Holder(puppets, [*SAME, *far, *range(200, 210), *far])
    two = Holder(puppets, SAME)
    world.targets[one.pid] = Target()
    world.targets[two.pid] = Target()
    world.epochs(7)
    assert shared(one.pid, inside(one)) == shared(two.pid, inside(two)) == 100
    alone = Span(one.page(1124), one.page(1134))
    with OtherProcess(one.pid) as space:
        found = space.mappings(Span(one.span.start, one.span.start + PAGE_SIZE))
        assert ksm.MARK in found[0].flags
        assert all(ksm.MARK not in each.flags for each in space.mappings(alone))


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


def test_whoever_is_killed_while_ksmd_works_leaves_all_right(puppets, runtime):
    """Programs have their bytes; the next command gives ksmd's knobs back."""
    if reason := ksm.obstacle():
        pytest.skip(reason)
    knobs = ksm._knobs()
    crew = [marked(Holder(puppets, [*range(1, 20_000)])) for _ in range(2)]
    sums = [one.ask("sum") for one in crew]
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
