"""`sksm merge` and `sksm unmerge` on processes that hold known pages."""

import os
import signal
from pathlib import Path

import pytest

from sksm import others, outcomes
from sksm.errors import NotPermitted, ProcessGone, Unsupported
from sksm.linux import ksm
from sksm.linux.features import Feature
from sksm.pages import is_pool
from sksm.process import guards, permission, runtimes, status
from sksm.report import OUTCOMES
from sksm.spans import PAGE_SIZE
from tests.commands.test_estimate import ended_pid
from tests.conftest import NO_KSM
from tests.process.subject import Piece, Subject, mappings_of, state_of
from tests.process.test_runtimes import JEMALLOC

pytestmark = [
    pytest.mark.needs(
        Feature.PTRACE_SEIZE, Feature.PIDFD_GETFD, Feature.USERFAULTFD_WP
    ),
    pytest.mark.usefixtures("patient", "runtime"),
]

PAGES = 32
NOW = ("--watch", "0")


@pytest.fixture
def content(different):
    return different(PAGES).tobytes()


@pytest.fixture
def holder(worker, content):
    """Give `holder()`: a process that holds `content`, and where."""

    def start(**popen):
        piece = Piece(Subject(worker, **popen), PAGES)
        piece.write(content)
        piece.subject.rests()
        return piece

    return start


@pytest.fixture
def alike(holder):
    """Two processes that hold the same pages."""
    return holder(), holder()


@pytest.fixture
def answer(sksm_here, answer_of):
    """Give `answer(command, *args)`: its JSON; it must have ended well."""

    def ask(command, *args):
        result = sksm_here(command, "--json", *map(str, args))
        assert result.exit_code == 0, result.stderr
        return answer_of(result.stdout)

    return ask


def pids_of(*pieces):
    return [str(piece.pid) for piece in pieces]


def in_pool(piece):
    return sum(m.span.pages for m in piece.mappings() if is_pool(m))


def named_by_unit(found, path=""):
    """List the numbers in an answer whose names do not tell their unit."""
    plain = {*OUTCOMES, "scanned", "schema", "pid", "stops", "mappings_added"}
    plain |= {"exit_code", "seconds"}
    for name, value in found.items():
        if isinstance(value, dict) and name != "reasons":  # of pages, by their reason
            yield from named_by_unit(value, f"{path}{name}.")
        elif isinstance(value, list):
            for one in value:
                yield from named_by_unit(one, f"{path}{name}.")
        elif type(value) in (int, float):
            told = name in plain or name.endswith(("_bytes", "_seconds"))
            yield from [] if told else [f"{path}{name}"]


# -- what it says


def test_answer_of_a_merge_has_what_is_promised(answer, alike, content):
    """Counts that add up, names with units, totals that are sums."""
    found = answer("merge", *NOW, *pids_of(*alike))
    assert (found["command"], found["engine"], found["dry_run"]) == (
        "merge",
        "pool",
        False,
    )
    assert found["watched_seconds"] == 0
    assert [str(one["pid"]) for one in found["processes"]] == pids_of(*alike)
    assert list(named_by_unit(found)) == []
    for one in (found, *found["processes"]):
        assert one["scanned"] == sum(one[name] for name in OUTCOMES)
        assert one["saved_bytes"] == (one["merged"] + one["zero"]) * PAGE_SIZE
        assert one["refused"] == sum(one["reasons"].values())
        assert 0 < one["stopped_p99_seconds"] <= one["stopped_max_seconds"]
        assert one["stops"] > 0
        assert one["failures"] == []
    for name in ("merged", "stored", "stops", "pss_before_bytes", "pss_after_bytes"):
        assert found[name] == sum(one[name] for one in found["processes"]), name
    assert found["duplicate_bytes"] >= (PAGES - 1) * PAGE_SIZE
    assert found["pss_after_bytes"] < found["pss_before_bytes"]
    assert [piece.read() for piece in alike] == [content] * 2


def test_answer_of_an_unmerge_has_what_is_promised(answer, alike, content):
    """The same pages come back that were merged."""
    answer("merge", *NOW, *pids_of(*alike))
    shared = sum(in_pool(piece) for piece in alike)
    found = answer("unmerge", *pids_of(*alike))
    assert found["command"] == "unmerge"
    assert list(named_by_unit(found)) == []
    assert found["unmerged_bytes"] >= shared * PAGE_SIZE
    total = sum(one["unmerged_bytes"] for one in found["processes"])
    assert found["unmerged_bytes"] == total
    assert [in_pool(piece) for piece in alike] == [0, 0]
    assert [piece.read() for piece in alike] == [content] * 2


@pytest.mark.usefixtures("in_80_columns")
def test_text_fits_a_terminal(sksm_program, alike):
    """Each process, the sum, how long they stood still, what was left."""
    pids = pids_of(*alike)
    merged = sksm_program("merge", "--engine", "pool", *NOW, *pids)
    unmerged = sksm_program("unmerge", *pids)
    for result in (merged, unmerged):
        assert (result.returncode, result.stderr) == (0, "")
        assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80
        assert all(pid in result.stdout for pid in pids)
        assert "Stopped" in result.stdout
    assert "Memory of 2 processes" in " ".join(merged.stdout.split())
    assert "RSS does not fall" in merged.stdout


def test_a_dry_run_changes_nothing(sksm_here, answer, alike):
    """It says what would be freed, and that it was one."""
    pids = pids_of(*alike)
    before = [state_of(piece.pid) for piece in alike]
    found = answer("merge", "--dry-run", *pids)
    assert found["dry_run"] is True
    assert found["duplicate_bytes"] >= (PAGES - 1) * PAGE_SIZE
    assert found["stops"] == found["scanned"] == 0
    result = sksm_here("merge", "--dry-run", *pids)
    assert result.exit_code == 0
    assert "would be merged" in result.stdout
    assert [state_of(piece.pid) for piece in alike] == before


def test_a_process_named_twice_counts_once(answer, alike):
    """It does not become its own twin."""
    one = alike[0].pid
    assert len(answer("merge", *NOW, one, one)["processes"]) == 1
    assert len(answer("unmerge", one, one)["processes"]) == 1


def test_watching_takes_no_longer_than_asked_for(answer, alike):
    """Five seconds are the most, unless told otherwise."""
    seen = []

    def merge(pids, wishes, step):
        seen.append(wishes)
        return [outcomes.Outcome(pid, "some") for pid in pids]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(others, "merge", merge)
        answer("merge", alike[0].pid)
        answer("merge", "--watch", 2, "--engine", "pool", alike[0].pid)
    assert [one.watch_seconds for one in seen] == [others.WATCH_SECONDS, 2]
    assert [one.engine for one in seen] == ["auto", "pool"]


# -- allocators


@pytest.mark.skipif(not JEMALLOC.exists(), reason="libjemalloc2 is not installed")
@pytest.mark.usefixtures("no_ksm")
def test_a_program_with_jemalloc_is_refused_by_the_pool(sksm_here, holder):
    """It may count on dropped memory to read as zeros. What would help is said."""
    piece = holder(env={**os.environ, "LD_PRELOAD": str(JEMALLOC)})
    before = mappings_of(piece.pid)
    result = sksm_here("merge", *NOW, str(piece.pid))
    assert (result.exit_code, result.stdout) == (3, "")
    reason = runtimes.DOUBT.format(runtimes.JEMALLOC)
    assert result.stderr == (
        f"sksm: process {piece.pid} was left alone: {reason}. "
        f"By KSM it could be merged, but {NO_KSM}\n"
    )
    assert mappings_of(piece.pid) == before


@pytest.mark.skipif(not JEMALLOC.exists(), reason="libjemalloc2 is not installed")
def test_a_program_with_jemalloc_is_merged_with_a_warning_if_told_to(
    sksm_here, holder, content
):
    """Who says `--engine pool` takes the risk, and is told which."""
    piece = holder(env={**os.environ, "LD_PRELOAD": str(JEMALLOC)})
    twin = holder()
    pids = pids_of(piece, twin)
    result = sksm_here("merge", "--engine", "pool", *NOW, *pids)
    assert result.exit_code == 0
    reason = runtimes.DOUBT.format(runtimes.JEMALLOC)
    assert result.stderr == f"sksm: warning: process {piece.pid}: {reason}\n"
    assert in_pool(piece) >= PAGES - 1
    assert piece.read() == content


@pytest.mark.machine
@pytest.mark.root
@pytest.mark.skipif(not JEMALLOC.exists(), reason="libjemalloc2 is not installed")
def test_a_program_with_jemalloc_is_merged_by_ksm(sksm_here, answer, holder, content):
    """Nobody has to say so; it is undone as everything is; no knob stays turned."""
    if reason := ksm.obstacle():
        pytest.skip(reason)
    knobs, fields = ksm._knobs(), {**os.environ, "LD_PRELOAD": str(JEMALLOC)}
    pieces = [holder(env=fields), holder(env=fields)]
    found = answer("merge", *NOW, *pids_of(*pieces))
    assert found["engine"] == "ksm"
    assert found["merged"] + found["stored"] >= 2 * (PAGES - 1)
    assert [one["engine"] for one in found["processes"]] == ["ksm", "ksm"]
    assert all(ksm.merged_pages(piece.pid) >= PAGES - 1 for piece in pieces)
    assert all(piece.read() == content for piece in pieces)
    assert ksm._knobs() == knobs

    undone = answer("unmerge", *pids_of(*pieces))
    assert undone["unmerged_bytes"] >= 2 * (PAGES - 1) * PAGE_SIZE
    assert answer("unmerge", *pids_of(*pieces))["unmerged_bytes"] == 0
    assert all(piece.read() == content for piece in pieces)


@pytest.mark.machine
@pytest.mark.root
@pytest.mark.skipif(not JEMALLOC.exists(), reason="libjemalloc2 is not installed")
def test_both_engines_at_once_are_told_apart(answer, holder):
    """Each process by its own."""
    if reason := ksm.obstacle():
        pytest.skip(reason)
    fields = {**os.environ, "LD_PRELOAD": str(JEMALLOC)}
    pieces = [holder(), holder(), holder(env=fields), holder(env=fields)]
    found = answer("merge", *NOW, *pids_of(*pieces))
    engines = [one["engine"] for one in found["processes"]]
    assert found["engine"] == "mixed"
    assert engines == ["pool", "pool", "ksm", "ksm"]


# -- processes that cannot be merged

COMMANDS = ["merge", "unmerge"]


@pytest.mark.parametrize("command", COMMANDS)
def test_those_that_can_be_are_and_the_others_are_named(
    sksm_here, answer_of, alike, command
):
    """On stderr, and in the answer; the exit status is that of success."""
    gone = ended_pid()
    result = sksm_here(command, "--json", str(gone), *pids_of(*alike))
    assert result.exit_code == 0
    assert f"no process {gone}" in result.stderr
    found = answer_of(result.stdout)
    (failure,) = found["failures"]
    assert (failure["pid"], failure["exit_code"]) == (gone, 1)
    assert [str(one["pid"]) for one in found["processes"]] == pids_of(*alike)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_process_at_all_exits_with_1(sksm_here, command):
    """And each is named, once."""
    result = sksm_here(command, str(ended_pid()), str(ended_pid()))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("no process") == 2


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("error", "code"), [(ProcessGone, 1), (Unsupported, 3), (NotPermitted, 4)]
)
def test_reason_chooses_the_exit_status(sksm_here, monkeypatch, command, error, code):
    """When nothing could be done."""

    def refuse(pid):
        raise error(f"not {pid}")

    monkeypatch.setattr(permission, "require_memory", refuse)
    result = sksm_here(command, "7")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == "sksm: not 7\n"


def test_what_must_be_left_alone_exits_with_3(sksm_here, alike, monkeypatch):
    """With the reason, for un-merging, too: the same would break it."""
    pid = alike[0].pid
    sksm_here("merge", *NOW, *pids_of(*alike))
    monkeypatch.setattr(guards, "objection_to", lambda *_, **__: "so it is")
    for command in COMMANDS:
        result = sksm_here(command, str(pid))
        assert (result.exit_code, result.stdout) == (3, "")
        assert result.stderr == f"sksm: process {pid} was left alone: so it is\n"


def test_a_process_does_not_merge_itself(sksm_here):
    """It would wait for itself."""
    result = sksm_here("merge", str(os.getpid()))
    assert result.exit_code == 3
    assert "it is this process" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_process_of_another_user_exits_with_4(sksm_here, foreign, command):
    """With the way out."""
    result = sksm_here(command, str(foreign))
    assert result.exit_code == 4
    assert "belongs to uid 0" in result.stderr
    assert "CAP_SYS_PTRACE" in result.stderr


def test_yama_is_named_where_it_forbids(sksm_here, alike, monkeypatch, tmp_path):
    """And the setting that would let us; nothing is changed by us."""
    (tmp_path / "scope").write_text("1\n")
    monkeypatch.setattr(permission, "YAMA", tmp_path / "scope")
    monkeypatch.setattr(permission, "_without_capability", lambda *_: None)
    monkeypatch.setattr(permission, "CAP_SYS_PTRACE", 63)  # nobody has it

    def denied(_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(runtimes, "doubt", denied)
    before = state_of(alike[0].pid)
    result = sksm_here("merge", str(alike[0].pid))
    assert result.exit_code == 4
    assert "kernel.yama.ptrace_scope=0" in result.stderr
    assert state_of(alike[0].pid) == before


def test_a_lack_of_memory_keeps_everything_merged(sksm_here, alike, monkeypatch):
    """Nothing is begun that could not be finished."""

    class Full:
        available = PAGE_SIZE

    sksm_here("merge", *NOW, *pids_of(*alike))
    before = [mappings_of(piece.pid) for piece in alike]
    monkeypatch.setattr("psutil.virtual_memory", lambda: Full)
    result = sksm_here("unmerge", *pids_of(*alike))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "only 4096 are available" in result.stderr
    assert [mappings_of(piece.pid) for piece in alike] == before


def test_ctrl_c_ends_a_merge_quietly(sksm_here, alike, content, monkeypatch):
    """With 130, and the processes as they were, or merged: nothing in between."""

    def interrupt(_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(status, "pss", interrupt)
    result = sksm_here("merge", *NOW, *pids_of(*alike))
    assert (result.exit_code, result.stdout) == (130, "")
    assert [piece.read() for piece in alike] == [content] * 2
    assert "t" not in {
        Path(f"/proc/{piece.pid}/stat").read_text().split()[2] for piece in alike
    }


# -- usage


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("args", [[], ["x"], ["0"], ["-1"], ["--engine", "x", "1"]])
def test_wrong_usage_exits_with_2(sksm_here, command, args):
    """A PID at least, and an engine that is one."""
    assert sksm_here(command, *args).exit_code == 2


def test_a_time_to_watch_is_not_negative(sksm_here):
    """Zero is none."""
    assert sksm_here("merge", "--watch", "-1", "7").exit_code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_happens_to_the_processes(sksm_here, command):
    """-h and --help are the same, and show how to begin."""
    short, long = sksm_here(command, "-h"), sksm_here(command, "--help")
    assert short.exit_code == 0
    assert short.stdout == long.stdout
    text = " ".join(short.stdout.split())
    assert f"Example: sksm {command}" in text
    assert "processes" in text
    assert "--json" in text
