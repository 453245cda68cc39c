"""A service follows its configuration, and its figures only grow where they must."""

import contextlib

import pytest

from sksm.errors import Misconfigured
from sksm.linux.features import Feature
from sksm.scanner import selection, service
from sksm.scanner.config import Config
from sksm.scanner.figures import Ledger
from sksm.scanner.scanner import Epoch, Target
from sksm.scanner.selection import Rule
from sksm.scanner.service import Service
from tests.process.holder import Holder
from tests.scanner.conftest import World
from tests.scanner.test_scanner import SAME, inside, merged

on_processes = pytest.mark.needs(
    Feature.USERFAULTFD_WP_ASYNC, Feature.PTRACE_SEIZE, Feature.PIDFD_GETFD
)
pytestmark = pytest.mark.usefixtures("runtime")


def watching(*holders, **settings):
    return Config(rules=tuple(Rule(pid=one.pid) for one in holders), **settings)


def members(scanner):
    return {
        pid: member
        for group in scanner.groups.values()
        for pid, member in group.members.items()
    }


def look(one):
    """Have an epoch that looks for processes."""
    one._scanner._select_at = 0.0
    return one.epoch()


@on_processes
def test_who_stays_watched_is_not_watched_anew(puppets):
    """What is known of it is kept; who is named no more is let go."""
    one, two, three = (Holder(puppets, SAME) for _ in range(3))
    with contextlib.closing(Service(watching(one, two))) as scanner:
        look(scanner)
        before = members(scanner._scanner)
        assert before.keys() == {one.pid, two.pid}
        scanner.follow(watching(two, three, quiet_seconds=9, cpu_percent=7))
        look(scanner)
        after = members(scanner._scanner)
    assert after.keys() == {two.pid, three.pid}
    assert after[two.pid] is before[two.pid]


@on_processes
def test_another_time_of_quiet_is_for_all(puppets):
    """For those that are known, and for those that come."""
    one, two = Holder(puppets, SAME), Holder(puppets, SAME)
    with contextlib.closing(Service(watching(one, quiet_seconds=200))) as scanner:
        look(scanner)
        scanner.follow(watching(one, two, quiet_seconds=2))
        look(scanner)
        known = members(scanner._scanner)
        for _ in range(6):
            for member in known.values():
                member.look(1.0)
        assert all(len(member.pages.due()) >= 100 for member in known.values())


def test_rules_that_stay_keep_what_is_known_by_them(monkeypatch):
    """What came of a process that has ended belongs to it still."""
    made = []

    class Counted(selection.Selection):
        def __init__(self, *rules):
            made.append(rules)
            super().__init__(*rules)

    monkeypatch.setattr(service, "Selection", Counted)
    rules = (Rule(name="no-such-program"),)
    with contextlib.closing(Service(Config(rules=rules))) as scanner:
        scanner.follow(Config(rules=rules, cpu_percent=9))
        assert len(made) == 1
        assert scanner._scanner.budget.share == pytest.approx(0.09)
        scanner.follow(Config(rules=(Rule(name="another"),)))
        assert len(made) == 2


@on_processes
def test_who_is_to_be_watched_otherwise_is_watched_anew(puppets):
    """As a virtual machine, say: only its guest's memory then."""
    one = Holder(puppets, SAME)
    with contextlib.closing(Service(watching(one))) as scanner:
        look(scanner)
        before = members(scanner._scanner)
        sight = scanner._sight
        found = {one.pid: Rule(pid=one.pid, qemu=True)}
        sight._selection.find = lambda: found
        look(scanner)
        assert members(scanner._scanner) == {}
        look(scanner)
        after = members(scanner._scanner)
    assert after.keys() == {one.pid}
    assert after[one.pid] is not before[one.pid]


def test_rules_are_asked_for_soon_after_they_have_changed():
    """Though an epoch may come before the next look for processes."""
    scanner = Service(Config(rules=(Rule(name="no-such-program"),)))
    with contextlib.closing(scanner):
        look(scanner)
        scanner._scanner.pause = 15.0
        assert scanner.pause == 15.0
        scanner.follow(Config(rules=(Rule(name="another"),)))
        assert scanner.pause == 1.0
        look(scanner)
        assert scanner.pause == scanner._scanner.pause


def test_nobody_to_watch_names_all_files_and_an_example(tmp_path):
    """None of them need be there."""
    paths = [tmp_path / "one.toml", tmp_path / "two.toml"]
    with pytest.raises(Misconfigured) as caught:
        service.configured(paths)
    assert f"{paths[0]} nor {paths[1]}" in str(caught.value)
    assert "[[watch]]" in str(caught.value)


@on_processes
def test_each_stop_is_told_once_and_totals_outlive_processes(puppets):
    """Of those that are gone, too."""
    world = World()
    one, two = Holder(puppets, SAME), Holder(puppets, SAME)
    world.targets = {one.pid: Target(), two.pid: Target()}
    ledger = Ledger(world.scanner)
    with contextlib.closing(world.scanner):
        told = []
        for _ in range(6):
            (done,) = world.epochs(1)
            told.append(ledger.figures(done))
        assert merged(one.pid, inside(one)) == 100
        for index in range(80):
            one.ask("put", index, index + 1)
        told.append(ledger.figures(*world.epochs(1)))
        one.process.end()
        two.process.end()
        told += [ledger.figures(done) for done in world.epochs(3)]
        told.append(ledger.figures(Epoch(99)))
    last = told[-1]
    assert last.processes == []
    assert last.unmerged_pages >= 80
    assert last.stops == sum(len(found.stopped_seconds) for found in told) > 0
    assert last.stopped_seconds == []
    assert 0 < last.stopped_p99_seconds <= last.stopped_max_seconds
    for name in ("unmerged_pages", "stops", "cpu_seconds", "stopped_max_seconds"):
        values = [getattr(found, name) for found in told]
        assert values == sorted(values)
