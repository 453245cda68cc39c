"""`sksm estimate` on processes that hold known pages."""

import mmap
import os
import signal

import numpy as np
import psutil
import pytest

from sksm.commands import outlook
from sksm.errors import NotPermitted, ProcessGone, Unsupported
from sksm.process import permission
from sksm.reporters import progress
from sksm.spans import PAGE_SIZE
from tests.conftest import poll
from tests.process.holder import Holder
from tests.puppets import Obedient

PAGES = 256


@pytest.fixture
def hold(puppets):
    """Give `hold(kinds)`: a process with a page of each kind."""
    return lambda kinds: Holder(puppets, kinds)


@pytest.fixture
def alike(hold):
    """Two processes that hold the same pages, a sixteenth of them zeros."""
    kinds = [index % 16 and index for index in range(PAGES)]
    return hold(kinds), hold(kinds)


@pytest.fixture
def estimate(sksm_here, answer_of):
    """Give `estimate(*args)`: the JSON answer."""

    def ask(*args):
        result = sksm_here("estimate", "--json", *map(str, args))
        assert result.exit_code == 0, result.stderr
        return answer_of(result.stdout)

    return ask


def test_answer_has_what_is_promised(estimate, alike):
    """Totals that are sums, gains that are differences, and the right process."""
    pids = [one.pid for one in alike]
    answer = estimate(*pids)
    assert [one["pid"] for one in answer["processes"]] == pids
    assert all(one["name"].startswith("python") for one in answer["processes"])
    total = answer["total"]
    assert total["zero_bytes"] >= 2 * PAGES // 16 * PAGE_SIZE
    assert total["duplicate_bytes"] >= PAGES * 15 // 16 * PAGE_SIZE
    for name, value in total.items():
        if isinstance(value, int):
            assert value == sum(one[name] for one in answer["processes"])
    freed = total["duplicate_bytes"] + total["zero_bytes"]
    assert [one["engine"] for one in answer["engines"]] == ["pool", "ksm", "kernel"]
    for engine in answer["engines"]:
        assert engine["freed_bytes"] == freed
        assert engine["net_bytes"] == freed - engine["cost_bytes"]
    assert answer["watched_seconds"] is total["hot_bytes"] is None
    assert answer["failures"] == []
    assert answer["seconds"] > 0


def test_a_process_named_twice_counts_once(estimate, alike):
    """It does not become its own twin."""
    pid = alike[0].pid
    once, twice = estimate(pid), estimate(pid, pid)
    assert len(twice["processes"]) == 1
    assert once["total"]["duplicate_bytes"] == twice["total"]["duplicate_bytes"]


def test_the_processes_are_left_as_they_were(estimate, alike):
    """Not stopped, not changed, and no page of theirs was touched."""
    pids = [one.pid for one in alike]
    for pid in pids:
        poll(lambda pid=pid: psutil.Process(pid).status() == psutil.STATUS_SLEEPING)
    before = [open_state(pid) for pid in pids]
    estimate(*pids)
    assert [open_state(pid) for pid in pids] == before


def open_state(pid):
    process = psutil.Process(pid)
    # Not its unique memory: of a file's pages, that ends where others map them, too.
    dirty = sum(area.private_dirty for area in process.memory_maps())
    rss = process.memory_info().rss
    return process.status(), dirty, rss, process.num_ctx_switches()


@pytest.mark.usefixtures("in_80_columns")
def test_text_fits_a_terminal(sksm_program, alike):
    """In 80 columns, with names in brackets as they are."""
    result = sksm_program("estimate", *(str(one.pid) for one in alike))
    assert result.returncode == 0
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80
    assert "Merging would save" in result.stdout
    assert "special mapping [vdso]" in result.stdout
    assert "in all" in result.stdout
    assert result.stderr == ""


class Array(Obedient):
    """Holds an array that begins somewhere within a page."""

    def __init__(self, at):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        area = mmap.mmap(-1, 301 * PAGE_SIZE, flags=flags)
        self.flat = np.frombuffer(area, np.uint8)[at:][: 299 * PAGE_SIZE]
        # Straight into it: malloc keeps what was freed, and that would be found, too.
        np.random.default_rng(5).random(out=self.flat.view(np.float64))


def test_arrays_at_other_offsets_within_a_page_are_hinted_at(
    estimate, sksm_here, puppets
):
    """Nothing of them is a duplicate; the way out is named."""
    pids = [puppets(Array, at).pid for at in (16, 64)]
    answer = estimate(*pids)
    found = [one["misaligned_bytes"] // PAGE_SIZE for one in answer["processes"]]
    assert found[0] < 298 <= found[1]
    assert answer["total"]["misaligned_bytes"] == sum(found) * PAGE_SIZE
    assert "sksm.empty" in sksm_here("estimate", *map(str, pids)).stdout


def test_progress_shows_on_a_terminal_once_it_has_taken_a_while(monkeypatch, capsys):
    """And not before, nor elsewhere."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    for after, shown in ((1000, False), (0, True)):
        monkeypatch.setattr(progress, "_SHOWN_AFTER_SECONDS", after)
        with progress.progress() as step:
            step("reading 7", 10)(5)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("reading 7" in captured.err) == shown
        assert "\x1b[3" not in captured.err


def test_processes_of_different_domains_are_not_compared(estimate, alike, monkeypatch):
    """They will not be merged with each other."""
    one, two = alike
    pids = [one.pid, two.pid]
    together = estimate(*pids)["total"]
    alone = sum(estimate(pid)["total"]["duplicate_bytes"] for pid in pids)
    monkeypatch.setattr(outlook.domain, "of", lambda pid: pid)
    apart = estimate("--watch", 0.01, *pids[::-1])
    assert [process["pid"] for process in apart["processes"]] == pids[::-1]
    assert apart["total"]["duplicate_bytes"] == alone < together["duplicate_bytes"]
    assert apart["total"]["hot_bytes"] is not None


# -- processes that cannot be looked at


def ended_pid():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_those_that_can_be_looked_at_are_shown_and_the_others_named(
    sksm_here, answer_of, alike
):
    """On stderr, and in the answer; the exit status is that of success."""
    gone = ended_pid()
    result = sksm_here("estimate", "--json", str(gone), str(alike[0].pid))
    assert result.exit_code == 0
    assert f"no process {gone}" in result.stderr
    (failure,) = answer_of(result.stdout)["failures"]
    assert (failure["pid"], failure["exit_code"]) == (gone, 1)


def test_no_process_at_all_exits_with_1(sksm_here):
    """And each is named."""
    result = sksm_here("estimate", str(ended_pid()), str(ended_pid()))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("no process") == 2


@pytest.mark.parametrize(
    ("error", "code"), [(ProcessGone, 1), (Unsupported, 3), (NotPermitted, 4)]
)
def test_reason_chooses_the_exit_status(sksm_here, monkeypatch, error, code):
    """When nothing could be looked at."""

    def refuse(pid):
        raise error(f"not {pid}")

    monkeypatch.setattr(permission, "require_memory", refuse)
    result = sksm_here("estimate", "7")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == "sksm: not 7\n"


def test_process_of_another_user_exits_with_4(sksm_here, foreign):
    """With the way out."""
    result = sksm_here("estimate", str(foreign))
    assert result.exit_code == 4
    assert "belongs to uid 0" in result.stderr
    assert "CAP_SYS_PTRACE" in result.stderr


def test_process_that_ends_while_it_is_watched_is_named(sksm_here, alike, monkeypatch):
    """The others are told of all the same, and it counts no more."""
    one, two = alike

    def end(watches, seconds, tell):
        os.kill(one.pid, signal.SIGKILL)
        one.process.wait()
        watches[0].look()

    monkeypatch.setattr(outlook, "keep_looking", end)
    result = sksm_here("estimate", "--watch", "1", str(one.pid), str(two.pid))
    assert result.exit_code == 0
    assert result.stderr == f"sksm: process {one.pid} ended meanwhile\n"
    assert f"{two.pid}" in result.stdout
    assert f"{one.pid}" not in result.stdout


@pytest.mark.parametrize(
    "args", [[], ["x"], ["0"], ["-1"], ["--watch", "0", "1"], ["--watch", "1"]]
)
def test_wrong_usage_exits_with_2(sksm_here, args):
    """A PID at least, and a time that is one."""
    assert sksm_here("estimate", *args).exit_code == 2


# -- watching


def test_pages_that_are_written_to_are_hot(estimate, alike, monkeypatch):
    """They are counted, and are no duplicates any more; nor are those they equal."""
    one, two = alike
    pids = [one.pid, two.pid]

    def write(watches, seconds, tell):
        (watch,) = watches
        one.ask("put", 1, 1000)
        watch.look()
        one.ask("put", 1, 1)  # as before: it was seen all the same
        one.ask("put", 16, 1001)
        watch.look()

    monkeypatch.setattr(outlook, "keep_looking", write)
    answer = estimate("--watch", 1, *pids)
    assert answer["watched_seconds"] == 1
    hot = [process["hot_bytes"] // PAGE_SIZE for process in answer["processes"]]
    assert hot[0] >= 2
    total = answer["total"]
    assert total["hot_bytes"] == sum(hot) * PAGE_SIZE
    assert total["duplicate_bytes"] - total["cold_duplicate_bytes"] >= PAGE_SIZE
    assert total["zero_bytes"] - total["cold_zero_bytes"] >= PAGE_SIZE
    cold = total["cold_duplicate_bytes"] + total["cold_zero_bytes"]
    assert {engine["freed_bytes"] for engine in answer["engines"]} == {cold}


def test_watching_looks_several_times(estimate, alike):
    """For real, and not for long."""
    answer = estimate("--watch", 0.2, alike[0].pid)
    assert answer["seconds"] >= 0.2


NOTES = [
    ("guards.objection_to", "merging would be refused: so it is"),
    ("runtimes.doubt", "the engine pool would refuse it: so it is"),
]


@pytest.mark.parametrize("case", NOTES)
def test_what_would_keep_a_merge_away_is_told(
    estimate, sksm_here, alike, monkeypatch, case
):
    """The estimate is made all the same."""
    judge, note = case
    for name, _ in NOTES:
        verdict = "so it is" if name == judge else None
        monkeypatch.setattr(f"sksm.process.{name}", lambda _, said=verdict: said)
    pid = alike[0].pid
    (process,) = estimate(pid)["processes"]
    assert process["notes"] == [note]
    assert note in " ".join(sksm_here("estimate", str(pid)).stdout.split())
