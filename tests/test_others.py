"""What an operator does to running programs: who shares with whom, and who does not."""

import contextlib
import os
import signal

import numpy as np
import pytest

from sksm import others, unmerging
from sksm.daemon import launch
from sksm.daemon import runtime as directories
from sksm.daemon.client import RemoteStore
from sksm.errors import (
    DaemonUnreachable,
    NotPermitted,
    ProcessGone,
    SksmError,
    Unsupported,
)
from sksm.linux.features import Feature
from sksm.pages import is_pool
from sksm.process import guards, runtimes
from sksm.process.domain import Domain
from sksm.process.other import OtherProcess
from sksm.spans import PAGE_SIZE
from tests.conftest import ended, poll
from tests.process.subject import (
    Piece,
    Subject,
    descriptors_of,
    mappings_of,
    state_of,
    status_of,
    vdso_of,
)
from tests.puppets import Obedient

pytestmark = [
    pytest.mark.needs(
        Feature.PTRACE_SEIZE, Feature.PIDFD_GETFD, Feature.USERFAULTFD_WP
    ),
    pytest.mark.usefixtures("patient", "runtime", "daemons_end"),
]

PAGES = 48
ANOTHER = 65534  # somebody's uid, for root to become
AT_ONCE = others.Wishes(watch_seconds=0)


@pytest.fixture
def daemons_end(runtime):
    """End the daemons of all domains that the test began."""
    yield
    for whose in directories.others():
        with contextlib.suppress(DaemonUnreachable):
            store = RemoteStore(whose, start=False)
            with contextlib.closing(store):
                pid = store.status().pid
            os.kill(pid, signal.SIGTERM)
            poll(lambda pid=pid: ended(pid))


@pytest.fixture
def content(different):
    """Pages that several processes hold, and the last one of a mapping."""
    return different(PAGES).tobytes()


@pytest.fixture
def holder(worker, content):
    """Give `holder()`: a process that holds `content`, and where."""

    def start(uid=None):
        subject = Subject(worker)
        if uid is not None:
            subject.become(uid)
        return hold(subject, content)

    return start


def hold(subject, content):
    piece = Piece(subject, PAGES)
    piece.write(content)
    subject.rests()
    return piece


def untold(_name, _total):
    """A step that nobody wants to see."""
    return lambda _moved: None


def merge(*pieces, wishes=AT_ONCE, step=untold):
    """Merge the processes that hold these; gives their outcomes."""
    return others.merge([piece.pid for piece in pieces], wishes, step)


def in_pool(piece):
    """How many pages of it are the pool's."""
    return sum(m.span.pages for m in piece.mappings() if is_pool(m))


def assert_merged(*pieces):
    for piece in pieces:
        assert in_pool(piece) >= PAGES - 1


def frames_of(piece):
    return piece.frames()[: PAGES - 1]


# -- the usual case


def test_processes_share_what_they_hold_twice(holder, content):
    """The counts say so, the bytes are the same, and the kernel accounts for less."""
    one, two = pieces = holder(), holder()
    outcomes = merge(*pieces)
    assert [outcome.pid for outcome in outcomes] == [one.pid, two.pid]
    for outcome in outcomes:
        assert not outcome.failed
        assert outcome.name.startswith("python")
        assert outcome.stops
        assert min(outcome.stops) >= 0
    first, second = (outcome.report for outcome in outcomes)
    assert first.stored >= PAGES - 1
    assert second.merged >= PAGES - 1
    before = sum(outcome.pss_before for outcome in outcomes)
    assert sum(outcome.pss_after for outcome in outcomes) < before
    assert_merged(*pieces)
    assert one.read() == two.read() == content


@pytest.mark.check
@pytest.mark.root
def test_shared_pages_are_one_frame(holder, content):
    """Until one is written to, which the others do not see."""
    one, two = holder(), holder()
    merge(one, two)
    assert (frames_of(one) == frames_of(two)).all()
    one.write(b"mine", 5)
    same = (frames_of(one) == frames_of(two)).tolist()
    assert same == [at != 5 for at in range(PAGES - 1)]
    assert two.read() == content


def test_a_process_that_was_merged_has_nothing_of_ours(holder):
    """But the pages: no descriptor, no stub, no tracer."""
    pieces = holder(), holder()
    before = [(descriptors_of(p.pid), vdso_of(p.pid)) for p in pieces]
    merge(*pieces)
    for piece, state in zip(pieces, before, strict=True):
        assert (descriptors_of(piece.pid), vdso_of(piece.pid)) == state
        assert status_of(piece.pid, "TracerPid") == "0"
        assert status_of(piece.pid, "State")[0] in "SR"


def test_merging_twice_changes_nothing(holder, content):
    """What is merged is found merged."""
    pieces = holder(), holder()
    merge(*pieces)
    before = [mappings_of(piece.pid) for piece in pieces]
    again = merge(*pieces)
    for outcome in again:
        report = outcome.report
        assert (report.merged, report.stored, report.zero) == (0, 0, 0)
    assert [mappings_of(piece.pid) for piece in pieces] == before
    assert [piece.read() for piece in pieces] == [content] * 2


def test_a_later_process_merges_with_those_before(holder, content):
    """The daemon of the domain keeps what it was given."""
    one, two = holder(), holder()
    merge(one, two)
    three = holder()
    (outcome,) = merge(three)
    assert outcome.report.merged >= PAGES - 1
    assert_merged(three)
    assert three.read() == content


def test_a_dry_run_says_what_there_is_and_does_nothing(holder, runtime):
    """Not to the processes: they are read, and not stopped."""
    pieces = holder(), holder()
    before = [state_of(piece.pid) for piece in pieces]
    outcomes = merge(*pieces, wishes=others.Wishes(dry_run=True))
    total = sum(outcome.worth.duplicate_bytes for outcome in outcomes)
    assert total >= (PAGES - 1) * PAGE_SIZE
    for outcome in outcomes:
        assert outcome.stops == []
        assert outcome.report.scanned == 0
    assert [state_of(piece.pid) for piece in pieces] == before


# -- domains


@pytest.mark.root
def test_users_never_share_a_frame_with_each_other(holder, runtime):
    """Each has a pool of its own, and a daemon that keeps it."""
    mine, theirs = (holder(), holder()), (holder(ANOTHER), holder(ANOTHER))
    outcomes = merge(mine[0], theirs[0], mine[1], theirs[1])
    assert not any(outcome.failed for outcome in outcomes)
    assert_merged(*mine, *theirs)
    assert (frames_of(mine[0]) == frames_of(mine[1])).all()
    assert (frames_of(theirs[0]) == frames_of(theirs[1])).all()
    assert not np.isin(frames_of(mine[0]), frames_of(theirs[0])).any()
    assert directories.others() == [Domain(ANOTHER)]
    pids = set()
    for whose in (None, Domain(ANOTHER)):
        assert directories.socket_path(whose).exists()
        store = RemoteStore(whose, start=False)
        with contextlib.closing(store):
            pids.add(store.status().pid)
    assert len(pids) == 2


@pytest.mark.root
def test_a_guarded_process_shares_with_its_like_only(holder):
    """Its own user may not look at it, and must not learn by timing what it holds."""
    plain, guarded = (
        (holder(ANOTHER), holder(ANOTHER)),
        (holder(ANOTHER), holder(ANOTHER)),
    )
    for piece in guarded:
        piece.subject.do("hide()")
    merge(*plain, *guarded)
    assert_merged(*plain, *guarded)
    assert (frames_of(plain[0]) == frames_of(plain[1])).all()
    assert (frames_of(guarded[0]) == frames_of(guarded[1])).all()
    assert not np.isin(frames_of(plain[0]), frames_of(guarded[0])).any()
    assert set(directories.others()) == {Domain(ANOTHER), Domain(ANOTHER, True)}


@pytest.mark.root
def test_a_process_of_several_users_is_refused(holder):
    """It belongs to nobody in particular; the others are merged."""
    one, two, torn = holder(), holder(), holder()
    torn.subject.do(f"os.setresuid({ANOTHER}, 0, 0)")
    *done, refused = merge(one, two, torn)
    assert isinstance(refused.error, Unsupported)
    assert "several user ids" in str(refused.error)
    assert not any(outcome.failed for outcome in done)
    assert_merged(one, two)
    assert in_pool(torn) == 0


# -- daemons


def test_where_no_daemon_can_be_had_a_pool_of_our_own_will_do(
    holder, content, monkeypatch
):
    """The processes share all the same; nobody who comes later will."""
    monkeypatch.setattr(launch, "_command", lambda: ["/bin/false"])
    one, two = holder(), holder()
    outcomes = merge(one, two)
    assert not any(outcome.failed for outcome in outcomes)
    assert_merged(one, two)
    if os.getuid() == 0:
        assert (frames_of(one) == frames_of(two)).all()
    assert one.read() == two.read() == content


def test_merged_memory_outlives_its_daemon(holder, content, runtime):
    """The mappings keep the pool."""
    one, two = holder(), holder()
    merge(one, two)
    store = RemoteStore(start=False)
    with contextlib.closing(store):
        daemon = store.status().pid
    os.kill(daemon, signal.SIGKILL)
    poll(lambda: ended(daemon))
    assert one.read() == two.read() == content


# -- pages that are written to


@pytest.mark.needs(Feature.USERFAULTFD_WP_ASYNC)
def test_pages_that_are_written_to_are_left_alone(holder, content):
    """Even if they hold what they held before; they are counted as hot."""
    one, two = holder(), holder()
    hot = range(PAGES // 2)

    def step(name, _total):
        if name == "watching":
            for page in hot:
                one.write(content[page * PAGE_SIZE :][:8], page)
        return lambda _moved: None

    wishes = others.Wishes(watch_seconds=0.5)
    busy, idle = merge(one, two, wishes=wishes, step=step)
    assert busy.hot_bytes >= len(hot) * PAGE_SIZE
    assert busy.report.reasons[others.HOT] == busy.hot_bytes // PAGE_SIZE
    assert not idle.failed
    assert in_pool(one) == PAGES - 1 - len(hot)
    assert one.mappings()[0].span == one.part(0, len(hot))
    assert one.read() == two.read() == content


@pytest.mark.needs(Feature.USERFAULTFD_WP_ASYNC)
def test_watching_leaves_nothing_behind(holder, content):
    """The memory is watched by nobody afterwards: it merges at the next call."""
    one, two = holder(), holder()
    others_before = descriptors_of(one.pid)

    def step(name, _total):
        if name == "watching":
            for page in range(PAGES):
                for piece in (one, two):
                    piece.write(content[page * PAGE_SIZE :][:8], page)
        return lambda _moved: None

    wishes = others.Wishes(watch_seconds=0.5)
    merge(one, two, wishes=wishes, step=step)
    assert in_pool(one) == in_pool(two) == 0
    assert descriptors_of(one.pid) == others_before
    merge(one, two)
    assert_merged(one, two)


# -- what goes wrong with one of them


def steps_that(word, deed):
    """Do something when a step of that name begins."""

    def step(name, _total):
        if name == word:
            deed()
        return lambda _moved: None

    return step


@pytest.mark.parametrize("moment", ["reading", "merging"])
def test_a_process_that_ends_meanwhile_is_an_outcome(holder, content, moment):
    """The others are merged."""
    one, gone, two = holder(), holder(), holder()
    step = steps_that(f"{moment} {gone.pid}", gone.subject.process.kill)
    outcomes = merge(one, gone, two, step=step)
    assert isinstance(outcomes[1].error, ProcessGone)
    assert not outcomes[0].failed
    assert not outcomes[2].failed
    assert_merged(one, two)
    assert one.read() == two.read() == content


def test_a_process_that_is_not_there_is_an_outcome(holder):
    """Named first or last."""
    one, two = holder(), holder()
    gone = holder()
    gone.subject.process.kill()
    outcomes = merge(gone, one, two, gone)
    by_pid = {outcome.pid: outcome for outcome in outcomes}
    assert isinstance(by_pid[gone.pid].error, ProcessGone)
    assert_merged(one, two)


def test_a_process_whose_main_thread_ended_is_an_outcome(holder):
    """Its threads go on, and are left alone."""
    one, two, headless = holder(), holder(), holder()
    (tid,) = headless.subject.do("threads(1)")
    headless.subject.tell("end_main_thread()")
    poll(lambda: status_of(headless.pid, "State").startswith("Z"))
    outcomes = merge(one, headless, two)
    assert isinstance(outcomes[1].error, Unsupported)
    assert_merged(one, two)
    assert status_of(f"{headless.pid}/task/{tid}", "TracerPid") == "0"


@pytest.mark.usefixtures("no_ksm")
@pytest.mark.parametrize("judge", ["objection_to", "doubt"])
def test_a_process_that_must_be_left_alone_is(holder, monkeypatch, judge):
    """With the reason; the others are merged."""
    one, two, left = holder(), holder(), holder()
    said = {left.pid: "so it is"}
    module = guards if judge == "objection_to" else runtimes
    monkeypatch.setattr(module, judge, lambda pid, **_: said.get(pid))
    before = state_of(left.pid)
    *done, refused = merge(one, two, left)
    assert refused.refusal.startswith("so it is")
    assert not any(outcome.failed for outcome in done)
    assert_merged(one, two)
    assert state_of(left.pid) == before


def test_who_insists_is_not_asked_about_allocators(holder, monkeypatch):
    """But what would break a program for certain stays refused."""
    one, two = holder(), holder()
    monkeypatch.setattr(runtimes, "doubt", lambda _: "so it is")
    merge(one, two, wishes=others.Wishes(watch_seconds=0, engine="pool"))
    assert_merged(one, two)
    monkeypatch.setattr(guards, "objection_to", lambda *_, **__: "never")
    (outcome,) = merge(one, wishes=others.Wishes(watch_seconds=0, engine="pool"))
    assert outcome.refusal == "never"


def test_a_process_of_somebody_else_is_an_outcome(holder, foreign):
    """With the way out."""
    one, two = holder(), holder()
    *done, refused = others.merge([one.pid, two.pid, foreign], AT_ONCE, untold)
    assert isinstance(refused.error, NotPermitted)
    assert "belongs to uid 0" in str(refused.error)
    assert not any(outcome.failed for outcome in done)
    assert_merged(one, two)


@pytest.mark.parametrize("seconds", [0, 0.1])
def test_a_process_that_another_of_us_is_merging_is_an_outcome(
    holder, puppets, seconds
):
    """It says which."""
    one, two, busy = holder(), holder(), holder()
    other = puppets(Merger)
    other.enter(busy.pid)
    wishes = others.Wishes(watch_seconds=seconds)
    *done, refused = merge(one, two, busy, wishes=wishes)
    assert f"process {other.pid} is merging it" in str(refused.error)
    assert not any(outcome.failed for outcome in done)
    assert_merged(one, two)
    assert in_pool(busy) == 0
    other.leave()


class Merger(Obedient):
    """Has a foothold in another process, from one deed to the next."""

    def enter(self, pid):
        self.space = OtherProcess(pid)
        self.space.__enter__()
        self.space._established()

    def leave(self):
        self.space.__exit__(None, None, None)


def test_nobody_is_no_work(runtime):
    """No process, no outcome, no daemon."""
    assert others.merge([], AT_ONCE, untold) == []
    assert unmerging.unmerge([], untold) == []
    assert not directories.socket_path().exists()


# -- un-merging


def unmerge(*pieces):
    return unmerging.unmerge([piece.pid for piece in pieces], untold)


def test_unmerging_gives_everything_back(holder, content):
    """Nothing of the pool is left, and the bytes are the same."""
    one, two = holder(), holder()
    merge(one, two)
    shared = [in_pool_of(piece.pid) for piece in (one, two)]
    outcomes = unmerge(one, two)
    for outcome, pages in zip(outcomes, shared, strict=True):
        assert not outcome.failed
        assert outcome.unmerged_bytes == pages * PAGE_SIZE
    assert [in_pool_of(piece.pid) for piece in (one, two)] == [0, 0]
    if os.getuid() == 0:
        assert not np.isin(frames_of(one), frames_of(two)).any()
    assert one.read() == two.read() == content


def in_pool_of(pid):
    with OtherProcess(pid) as space:
        return sum(m.span.pages for m in space.mappings() if is_pool(m))


def test_unmerged_processes_merge_again(holder, content):
    """Nothing is remembered against them."""
    one, two = holder(), holder()
    merge(one, two)
    unmerge(one, two)
    merge(one, two)
    for piece in (one, two):  # it is two mappings by now, each with a last page
        assert in_pool(piece) >= PAGES - 2
    assert one.read() == two.read() == content


def test_unmerging_what_is_not_merged_does_nothing(holder):
    """The process is not even stopped."""
    one = holder()
    before = state_of(one.pid)
    (outcome,) = unmerge(one)
    assert (outcome.unmerged_bytes, outcome.failed, outcome.stops) == (0, False, [])
    assert state_of(one.pid) == before


def test_unmerging_needs_memory_for_all_of_it(holder, monkeypatch):
    """Without, nothing is done, and it says how much it would take."""
    one, two = holder(), holder()
    merge(one, two)
    pages = in_pool_of(one.pid) + in_pool_of(two.pid)

    class Full:
        available = pages * PAGE_SIZE - 1

    monkeypatch.setattr("psutil.virtual_memory", lambda: Full)
    with pytest.raises(SksmError, match=f"needs {pages * PAGE_SIZE} bytes"):
        unmerge(one, two)
    assert_merged(one, two)
    Full.available += 1
    unmerge(one, two)
    assert in_pool(one) == in_pool(two) == 0


def test_one_that_cannot_be_unmerged_does_not_keep_the_others(holder, monkeypatch):
    """One has ended, and of one the pages must be left alone."""
    one, gone, left = holder(), holder(), holder()
    merge(one, gone, left)
    gone.subject.process.kill()
    said = {left.pid: "so it is"}
    monkeypatch.setattr(guards, "objection_to", lambda pid, **_: said.get(pid))
    done, ended_one, refused = unmerge(one, gone, left)
    assert not done.failed
    assert in_pool(one) == 0
    assert isinstance(ended_one.error, ProcessGone)
    assert refused.refusal == "so it is"
    assert_merged(left)


# -- what is not worth it


@pytest.mark.by_gain
def test_what_frees_less_than_the_daemon_takes_is_left_alone(holder):
    """Merging it would be a loss. It says how big, and who insists gets it."""
    one, two = holder(), holder()
    outcomes = merge(one, two)
    assert all("less than the" in outcome.refusal for outcome in outcomes)
    assert in_pool(one) == in_pool(two) == 0
    merge(one, two, wishes=others.Wishes(watch_seconds=0, engine="pool"))
    assert_merged(one, two)
    three = holder()
    (outcome,) = merge(three)
    assert not outcome.failed, "the daemon is there anyway"
    assert_merged(one, three)
