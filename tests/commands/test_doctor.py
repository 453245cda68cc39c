"""`sksm doctor`: the table, and the exit code that follows from it."""

import errno
import os

import pytest

from sksm.commands import diagnosis, doctor
from sksm.linux import features, ksm
from sksm.linux.features import Feature, Trial
from sksm.process import guards, status
from sksm.process.other import OtherProcess
from tests.commands.test_estimate import ended_pid
from tests.process.subject import Piece, Subject

pytestmark = pytest.mark.usefixtures("runtime")


@pytest.fixture
def trial(monkeypatch):
    """Give `trial(attempt, *absent)`: the one trial that the table holds then."""

    def replace(attempt, *absent):
        fake = Trial("for a test", "wish harder", attempt, frozenset(absent))
        monkeypatch.setattr(features, "TRIALS", {Feature.KSM: fake})
        features.examine.cache_clear()

    monkeypatch.setattr(doctor, "engines", lambda: [_engine(True)])
    yield replace
    monkeypatch.undo()
    features.examine.cache_clear()


def _engine(works):
    return doctor.EngineEntry("pool", works, "so it is")


def fails(code):
    def attempt():
        raise OSError(code, os.strerror(code))

    return attempt


def test_what_works_is_shown_with_what_was_learned(sksm_here, trial, answer_of):
    """A trial that returns is a feature that works."""
    trial(lambda: "seen just now")
    result = sksm_here("doctor", "--json")
    entry, daemon = answer_of(result.stdout)["features"]
    assert entry["works"] is True
    assert (entry["reason"], entry["detail"]) == (None, "seen just now")
    assert daemon["name"] == "sksmd"
    assert daemon["works"] is True


def test_what_is_missing_has_the_kernels_reason_and_a_way_out(sksm_here, trial):
    """An errno on the trial's list means: not here."""
    trial(fails(errno.ENOSYS), errno.ENOSYS)
    assert features.missing(Feature.KSM) == "KSM: Function not implemented"
    text = sksm_here("doctor").stdout
    assert "missing" in text
    assert "Function not implemented" in text
    assert "wish harder" in text


def test_what_nobody_expects_is_a_bug(sksm_here, trial):
    """Any other errno is raised: neither works nor missing."""
    trial(fails(errno.EIO), errno.ENOSYS)
    result = sksm_here("doctor")
    assert result.exit_code == 1
    assert "Input/output error" in result.stderr


def test_nothing_can_be_merged_exits_with_3(sksm_here, trial, monkeypatch, answer_of):
    """Scripts need no text to know."""
    trial(lambda: "")
    assert sksm_here("doctor").exit_code == 0
    monkeypatch.setattr(doctor, "engines", lambda: [_engine(False)])
    result = sksm_here("doctor", "--json")
    assert result.exit_code == 3
    assert answer_of(result.stdout)["engines"][0]["works"] is False
    assert "Nothing can be merged here" in sksm_here("doctor").stdout


def test_daemon_that_cannot_start_is_a_line_of_the_table(
    sksm_here, trial, monkeypatch, tmp_path, answer_of
):
    """The doctor explains; it does not fail itself."""
    trial(lambda: "")
    closed = tmp_path / "open-to-all"
    closed.mkdir()
    closed.chmod(0o777)
    monkeypatch.setenv("SKSM_RUNTIME_DIR", str(closed))
    result = sksm_here("doctor", "--json")
    daemon = answer_of(result.stdout)["features"][-1]
    assert daemon["works"] is False
    assert str(closed) in daemon["reason"]


@pytest.mark.machine
@pytest.mark.needs(Feature.MEMFD, Feature.PAGEMAP, Feature.PROCESS_VM_READV)
@pytest.mark.usefixtures("in_80_columns")
def test_this_kernel_can_merge(sksm_program, answer_of):
    """The real thing, in 80 columns: every trial ends in an outcome."""
    result = sksm_program("doctor", "--json")
    assert result.returncode == 0, result.stderr
    found = answer_of(result.stdout)
    assert len(found["features"]) == len(Feature) + 1
    works = {engine["name"]: engine["works"] for engine in found["engines"]}
    steered = ksm.obstacle() is None
    assert works == {"pool": True, "ksm": steered, "kernel": False}
    text = sksm_program("doctor").stdout
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


@pytest.mark.check
def test_trials_leave_nothing_behind():
    """No descriptor, no mapping, no child."""
    features.examine.cache_clear()
    before = sorted(os.listdir("/proc/self/fd"))
    for feature in Feature:
        features.examine(feature)
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.needs(Feature.KSM)
def test_advice_without_effect_is_not_a_merge(monkeypatch):
    """An advice number may be somebody else's, and succeed: only frames count."""
    features.examine.cache_clear()
    monkeypatch.setattr("sksm.linux.libc.MADV_MERGE", 20)  # MADV_COLD
    assert "shares nothing" in features.missing(Feature.MADV_MERGE)
    features.examine.cache_clear()


# -- of a process


@pytest.fixture
def subject(worker):
    """A program that holds memory of many kinds, 256 pages of each."""
    one = Subject(worker)
    size = 256 * 4096
    own, zeros, single = (Piece(one, 256) for _ in range(3))
    one.do(f"write({own.start}, os.urandom(4096) * 256)")
    one.do(f"write({zeros.start}, bytes({size}))")
    one.do(f"write({single.start}, os.urandom({size}))")
    memfd = one.do("os.memfd_create('some')")
    one.do(f"os.ftruncate({memfd}, {size})")
    for name, fd in (("shared", memfd), ("plain", -1)):
        one.do(f"globals().update({name}=mmap.mmap({fd}, {size}))")
        one.do(f"{name}.write(b'x' * {size})")
    return one


def test_each_reason_has_its_bytes(sksm_here, answer_of, subject):
    """And everything is accounted for: nothing is changed by looking."""
    size = 256 * 4096
    result = sksm_here("doctor", "--json", str(subject.pid))
    assert result.exit_code == 0, result.stderr
    (found,) = answer_of(result.stdout)["processes"]
    sizes = {part["what"]: part["size_bytes"] for part in found["parts"]}
    assert sizes[diagnosis.WORTH] >= 2 * size - 2 * 4096
    assert sizes[diagnosis.UNIQUE] >= size - 4096
    assert sizes[diagnosis.MEMFD] == size
    assert sizes[diagnosis.TMPFS] >= size  # /dev/zero
    assert found["engine"] in ("pool", "kernel")
    assert found["seccomp"] == "no filter"
    assert all(part["meaning"] for part in found["parts"] if part["size_bytes"] > size)


@pytest.mark.usefixtures("in_80_columns")
def test_a_program_that_is_left_alone_is_told_why(sksm_here, monkeypatch, subject):
    """In words, with exit code 3, in 80 columns."""
    refuse = lambda *_, **__: "so it is"  # noqa: E731
    monkeypatch.setattr(guards, "objection_to", refuse)
    result = sksm_here("doctor", str(subject.pid))
    assert result.exit_code == 3
    assert "It would be left alone: so it is" in result.stdout
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80


def test_a_seccomp_filter_is_tried(sksm_here, answer_of, monkeypatch, subject):
    """What it would answer is told."""

    def forbids(_):
        raise OSError(errno.EOPNOTSUPP, "its filter would answer mmap with KILL")

    real = status.read
    monkeypatch.setattr(status, "read", lambda pid: {**real(pid), "Seccomp": "2"})
    monkeypatch.setattr(OtherProcess, "require_harmless", forbids)
    result = sksm_here("doctor", "--json", str(subject.pid))
    (found,) = answer_of(result.stdout)["processes"]
    assert found["seccomp"] == "its filter would answer mmap with KILL"


def test_no_such_process_is_an_error(sksm_here):
    """As with every command that takes a PID."""
    result = sksm_here("doctor", str(ended_pid()))
    assert result.exit_code == 1
    assert "no process" in result.stderr or "ended" in result.stderr
