"""The scanner on real processes, with a clock that the tests turn."""

import contextlib
import errno
import os
import signal

import psutil
import pytest

from sksm.daemon.client import RemoteStore
from sksm.errors import DaemonUnreachable
from sksm.linux import maps
from sksm.linux.pagemap import copied
from sksm.pages import is_pool
from sksm.process.domain import Domain
from sksm.process.other import OtherProcess
from sksm.scanner.figures import Ledger
from sksm.scanner.group import Group
from sksm.scanner.scanner import Target
from sksm.scanner.watched import FEW_PAGES, Watched
from sksm.spans import HUGE_SIZE, PAGE_SIZE, Span
from tests.conftest import end_daemon
from tests.process.freezer import Freezer
from tests.process.holder import Holder
from tests.scanner.conftest import WATCHING, World

pytestmark = [
    WATCHING,
    pytest.mark.usefixtures("runtime"),
]
SAME = list(range(1, 101))  # what all hold, by number


def end_daemon_of(domain):
    with contextlib.closing(RemoteStore(domain, start=False)) as store:
        os.kill(store.keeper, signal.SIGTERM)


def merged(pid, span):
    """Count the pages that show the pool, be they in the page table or not."""
    table = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        parts = [m.span & span for m in maps.every_mapping(pid) if is_pool(m)]
        return sum(part.pages - len(copied(table, [part])) for part in parts)
    finally:
        os.close(table)


def inside(holder, count=100):
    return Span(holder.span.start, holder.span.start + count * PAGE_SIZE)


def test_quiet_pages_with_twins_come_to_share(world, holder):
    """After as long as they must be quiet, and not before; others stay private."""
    one, two = holder([*SAME, *range(200, 300)]), holder([*SAME, *range(300, 400)])
    sums = one.ask("sum"), two.ask("sum")
    world.epochs(4)
    assert merged(one.pid, one.span) == merged(two.pid, two.span) == 0
    world.epochs(2)
    assert (one.ask("sum"), two.ask("sum")) == sums
    assert merged(one.pid, inside(one)) == merged(two.pid, inside(two)) == 100
    assert merged(one.pid, one.span) == 100


def test_what_is_written_to_is_left_alone(world, holder):
    """At every epoch, one page of each."""
    one, _two = holder(SAME), holder(SAME)
    for _ in range(10):
        one.ask("put", 7, 8)
        one.ask("put", 7, 7 + 1)
        world.epochs(1)
    numbers = merged(one.pid, inside(one))
    assert numbers == 99
    assert merged(one.pid, Span(one.page(7), one.page(8))) == 0


def test_a_page_that_is_unmerged_waits_twice_as_long(world, holder):
    """Counted, and merged again in the end."""
    one, two = holder(SAME), holder(SAME)
    world.epochs(6)
    for index in range(80):
        one.ask("put", index, index + 1)  # the same bytes, in a page of its own
    assert merged(one.pid, inside(one)) == 20
    world.epochs(6)
    assert world.member(one.pid).unmerged >= 80
    assert merged(one.pid, inside(one)) == 20
    world.epochs(4)
    assert merged(one.pid, inside(one)) == 100
    assert one.ask("sum") == two.ask("sum")


@pytest.mark.check
def test_zeros_become_the_kernels_page_of_zeros(world, holder):
    """They need no twin, and no pool."""
    one = holder([0] * 100)
    world.epochs(6)
    entries = world.member(one.pid).pages.merged()
    assert entries >= 100
    assert merged(one.pid, one.span) == 0
    assert one.ask("sum")


def test_whoever_comes_later_is_merged_with_those_before(world, holder):
    """The pool knows what they hold."""
    one, _two = holder(SAME), holder(SAME)
    world.epochs(6)
    three = holder(SAME)
    world.scanner._select_at = 0.0
    world.epochs(6)
    assert merged(three.pid, inside(three)) == 100
    assert one.ask("sum") == three.ask("sum")


@pytest.mark.root
def test_a_frozen_process_is_named_and_watched_when_it_is_thawed(world, holder):
    """The others are merged meanwhile; it is none of those that are left for good."""
    holder(SAME), holder(SAME)
    late = holder(SAME)
    with contextlib.closing(Freezer()) as group:
        group.add(late.pid)
        group.freeze()
        ledger = Ledger(world.scanner)
        epoch = world.epochs(6)[-1]
        (named,) = ledger.figures(epoch).refused
        assert (named.pid, world.scanner.refused) == (late.pid, {})
        assert "frozen" in named.reason or "stopped in time" in named.reason
    world.epochs(8)
    assert merged(late.pid, inside(late)) == 100
    assert ledger.figures(epoch).refused == []


def test_children_are_watched_anew_and_what_fork_shares_is_no_gain(world, holder):
    """The kernel does not carry the watch on to them."""
    one, two = holder(SAME), holder([*SAME[:50], *range(500, 550)])
    child = one.ask("fork")
    world.targets[child] = Target()
    world.epochs(6)
    assert merged(one.pid, inside(one)) == merged(child, inside(one)) == 50
    assert merged(two.pid, inside(two)) == 50


@pytest.mark.root
@pytest.mark.parametrize("group", ["", "together"])
def test_users_share_only_in_a_group_that_was_named(world, holder, puppets, group):
    """By default a domain is one user."""
    whose = Domain(os.getuid(), group=group) if group else None
    one = holder(SAME)
    two = Holder(puppets, SAME, uid=65534)
    world.targets = {pid: Target(domain=whose) for pid in (one.pid, two.pid)}
    world.epochs(6)
    found = merged(one.pid, inside(one)), merged(two.pid, inside(two))
    assert found == ((100, 100) if group else (0, 0))
    assert one.ask("sum") == two.ask("sum")
    if group:
        ((domain, _),) = world.scanner.groups
        assert domain.name == group
        end_daemon_of(domain)


def test_a_process_that_becomes_another_program_is_watched_anew(world, holder):
    """Nothing of the old one is left, the watch included."""
    one, two = holder(SAME), holder(SAME)
    world.epochs(6)
    one.ask("exec")
    one.hold(SAME)
    world.scanner._select_at = 0.0
    world.epochs(1)  # finds the old one gone
    world.scanner._select_at = 0.0
    world.epochs(7)
    assert merged(one.pid, inside(one)) == 100
    assert world.scanner.refused == {}
    assert one.ask("sum") == two.ask("sum")


def test_who_cannot_be_stopped_just_now_is_tried_again(world, holder, monkeypatch):
    """A thread of it may have been in the disk, or not back from who was killed."""
    one, two = holder(SAME), holder(SAME)
    share, failed = Watched.share, []

    def busy(member, *args):
        if member.pid == one.pid and not failed:
            failed.append(member)
            raise BlockingIOError(errno.EBUSY, os.strerror(errno.EBUSY))
        return share(member, *args)

    monkeypatch.setattr(Watched, "share", busy)
    world.epochs(16)
    assert failed
    assert merged(one.pid, inside(one)) == 100
    assert world.scanner.refused == {}
    assert one.ask("sum") == two.ask("sum")


def test_a_program_that_took_the_place_of_another_is_no_failure(world, holder):
    """Whatever it is by which that shows: here by how large it has become."""
    one = holder(SAME)
    world.epochs(1)
    member = world.member(one.pid)
    one.ask("exec")
    one.hold(SAME)  # by the new one
    member._layout._size = []  # another one than before
    with pytest.raises(ProcessLookupError) as caught:
        member._layout.news()
    assert caught.value.errno == errno.ESRCH


def test_a_process_that_ends_is_forgotten(world, holder):
    """The others stay as they are."""
    one, two = holder(SAME), holder(SAME)
    world.epochs(6)
    one.process.end()
    world.epochs(2)
    assert {
        pid for group in world.scanner.groups.values() for pid in group.members
    } == {two.pid}
    assert merged(two.pid, inside(two)) == 100


def test_a_process_that_may_not_be_merged_is_named_with_the_reason(world, holder):
    """Once, and the others go on."""
    one, _two = holder(SAME), holder(SAME)
    above = os.getppid()
    world.targets[above] = Target()
    world.epochs(6)
    assert "above it" in world.scanner.refused[above].refusal
    assert merged(one.pid, inside(one)) == 100


def test_memory_that_is_mapped_later_is_watched_too(world, holder):
    """And what is unmapped is forgotten."""
    one, two = holder(SAME[:70]), holder(SAME[:70])
    world.epochs(6)
    before = world.member(one.pid).pages.seen()
    for each in (one, two):
        each.hold(SAME)
    world.epochs(10)  # the interpreter's own pages become quiet one after another
    assert merged(one.pid, inside(one)) == 100
    assert world.member(one.pid).pages.seen() <= before + 200


def test_a_scanner_that_ends_leaves_all_merged_and_its_successor_goes_on(world, holder):
    """It finds what is merged, and merges it not again."""
    one, two = holder(SAME), holder(SAME)
    world.epochs(6)
    world.scanner.close()
    assert merged(one.pid, inside(one)) == 100
    next_ = World()
    next_.targets = world.targets
    with contextlib.closing(next_.scanner):
        next_.epochs(2)
        assert next_.member(one.pid).pages.merged() >= 100
        one.ask("put", 3, 9)
        next_.epochs(6)
        assert next_.member(one.pid).unmerged >= 1
        assert one.ask("sum") != two.ask("sum")


def test_a_daemon_that_ends_is_replaced(world, holder, runtime):
    """What it merged stays; what comes later is merged by the next."""
    one, two = holder(SAME[:70]), holder(SAME[:70])
    world.epochs(6)
    end_daemon(runtime)
    three, four = holder(SAME), holder(SAME)
    world.scanner._select_at = 0.0
    world.epochs(8)
    assert merged(three.pid, inside(three)) == 100
    assert merged(one.pid, inside(one, 70)) == 70
    assert one.ask("sum") == two.ask("sum")
    assert three.ask("sum") == four.ask("sum")


@pytest.mark.parametrize("error", [ConnectionResetError, DaemonUnreachable])
def test_a_store_that_fails_ends_nothing(world, holder, monkeypatch, error):
    """It is tried again with the next epoch, and nobody is given up for it."""
    one, _two = holder(SAME), holder(SAME)

    def fail(*_):
        raise error("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(RemoteStore, "lookup", fail)
        world.epochs(6)
    assert world.scanner.refused == {}
    assert merged(one.pid, one.span) == 0
    world.scanner._select_at = 0.0
    world.epochs(8)
    assert merged(one.pid, inside(one)) == 100


def test_what_there_is_no_time_for_is_done_later(world, holder, monkeypatch):
    """Some at a time; what is read or merged by then is not lost."""
    kinds = list(range(1, 301))
    one, two = holder(kinds), holder(kinds)
    rate = property(lambda _: 10_000.0, lambda *_: None)
    monkeypatch.setattr(Group, "_rate", rate, raising=False)
    world.scanner.budget.left = lambda: 0.01  # processor time for 100 pages
    counts = []
    while not counts or counts[-1] < 600 - 2 * FEW_PAGES:
        assert len(counts) < 300, counts
        world.epochs(1)
        counts.append(merged(one.pid, one.span) + merged(two.pid, two.span))
    assert counts == sorted(counts)
    assert len(set(counts)) > 3
    assert one.ask("sum") == two.ask("sum")


@pytest.mark.parametrize(("alike", "shared"), [(383, 0), (384, 384)])
def test_a_huge_page_is_broken_only_for_three_quarters_of_its_pages(
    world, holder, alike, shared
):
    """Else the program would lose more than is gained."""
    one = holder([*range(1, 1400)])
    first = -(-one.span.start // HUGE_SIZE) * HUGE_SIZE
    at = (first - one.span.start) // PAGE_SIZE
    if one.ask("huge"):
        pytest.skip("the kernel makes no huge page here")
    two = holder([*range(at + 1, at + 1 + alike)])
    world.epochs(6)
    assert merged(one.pid, one.span) == shared
    assert one.ask("sum")
    assert two.ask("sum")


def test_what_leaves_the_pool_is_given_back(world, holder, runtime):
    """By writes, or with a process; within two epochs, not when the daemon looks."""
    kinds = list(range(1, 401))
    one, two, three = holder(kinds), holder(kinds), holder(kinds[:100])
    world.epochs(6)
    (group,) = world.scanner.groups.values()
    before = group.shared_bytes
    assert before >= 400 * PAGE_SIZE
    for index in range(400):
        for each in (one, two):
            each.ask("put", index, index + 1)
    world.epochs(2, seconds=5.0)
    assert group.shared_bytes <= before - 300 * PAGE_SIZE
    assert one.ask("sum") == two.ask("sum")
    assert three.ask("sum")


def test_a_watch_leaves_nothing_behind_in_the_process(world, holder):
    """No mapping, no descriptor; for as long as it lasts, too."""
    one, _two = holder(SAME), holder(SAME)
    files = len(os.listdir(f"/proc/{one.pid}/fd"))
    with OtherProcess(one.pid) as space:
        mappings = space.count_mappings()
    world.epochs(2)
    assert len(os.listdir(f"/proc/{one.pid}/fd")) == files
    with OtherProcess(one.pid) as space:
        assert space.count_mappings() == mappings
    world.epochs(6)
    assert len(os.listdir(f"/proc/{one.pid}/fd")) == files


@pytest.mark.parametrize(
    "turns",
    [50, pytest.param(1440, marks=[pytest.mark.slow, pytest.mark.limit(900)])],
)
def test_many_epochs_leak_nothing(world, holder, turns):
    """Descriptors, memory; the longer one is a day, with something new each minute."""
    one, two = holder(SAME), holder(SAME)
    world.epochs(8)
    world.epochs(20, seconds=30.0)
    ours = psutil.Process()
    before = ours.num_fds(), ours.memory_info().rss
    theirs = [psutil.Process(each.pid).num_fds() for each in (one, two)]
    for turn in range(turns):
        one.ask("put", turn % 100, 1 + turn % 100)
        world.epochs(2, seconds=30.0)
    assert ours.num_fds() <= before[0]
    assert ours.memory_info().rss <= before[1] + (8 << 20)
    assert [psutil.Process(each.pid).num_fds() for each in (one, two)] == theirs
    assert one.ask("sum") == two.ask("sum")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_without_userfaultfd_pages_are_read_again_and_again(
    world, holder, monkeypatch, caplog, code
):
    """An old kernel, or a program that may not have one: slower, and said so."""

    def no_watch(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(OtherProcess, "watch", no_watch)
    one, two = holder(SAME), holder(SAME)
    for turn in range(6):
        one.ask("put", 7, 1000 + turn)
        world.epochs(1)
    assert "every page is read at every look" in caplog.text
    assert merged(one.pid, inside(one)) == 99
    assert merged(two.pid, inside(two)) >= 99
    one.ask("put", 3, 9)
    world.epochs(1)
    assert world.member(one.pid).unmerged >= 1
    one.ask("put", 3, 4)
    one.ask("put", 7, 8)
    assert one.ask("sum") == two.ask("sum")
