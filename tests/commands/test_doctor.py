"""`sksm doctor`: the table, and the exit code that follows from it."""

import errno
import os

import pytest

from sksm.commands import doctor
from sksm.linux import features
from sksm.linux.features import Feature, Trial

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


@pytest.mark.needs(Feature.MEMFD, Feature.PAGEMAP, Feature.PROCESS_VM_READV)
def test_this_kernel_can_merge(sksm_program, answer_of):
    """The real thing, in 80 columns: every trial ends in an outcome."""
    result = sksm_program("doctor", "--json")
    assert result.returncode == 0, result.stderr
    found = answer_of(result.stdout)
    assert len(found["features"]) == len(Feature) + 1
    assert [engine["works"] for engine in found["engines"]] == [True, False, False]
    text = sksm_program("doctor").stdout
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


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
