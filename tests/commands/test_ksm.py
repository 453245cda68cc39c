"""ksmd's knobs: borrowed, and given back whatever happens."""

import errno
import os
import signal

import pytest

from sksm.linux import ksm
from sksm.linux.features import Feature
from tests.conftest import poll
from tests.puppets import Obedient

FAKE = {
    **{"run": "0", "pages_to_scan": "100", "sleep_millisecs": "20"},
    **{"smart_scan": "1", "advisor_mode": "[none] scan-time"},
    **{"pages_shared": "0", "pages_sharing": "0"},
}


class Holds(Obedient):
    """Has ksmd for itself, from one deed to the next, or until a signal ends it."""

    def hold(self, state):
        with ksm.borrowed(state):
            ksm.open_wide()
            self.line.send((True, "mine"))
            self.line.recv()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of files that takes the place of /sys/kernel/mm/ksm."""
    path = tmp_path / "ksm"
    path.mkdir()
    for name, value in FAKE.items():
        (path / name).write_text(value + "\n")
    monkeypatch.setattr(ksm, "FOLDER", path)
    return path


@pytest.fixture
def state(tmp_path):
    return tmp_path / ksm.STATE_NAME


def _open_and_fail():
    ksm.open_wide()
    raise ZeroDivisionError


@pytest.mark.check
@pytest.mark.usefixtures("folder")
def test_knobs_are_open_inside_and_back_outside(state):
    """Also when the block fails."""
    before = ksm._knobs()
    with ksm.borrowed(state):
        ksm.open_wide()
        ksm.tune("run", "1")
        assert ksm._knobs() == {**before, **ksm.WIDE_OPEN, "run": "1"}
        assert state.exists()
    assert ksm._knobs() == before
    with pytest.raises(ZeroDivisionError), ksm.borrowed(state):
        _open_and_fail()
    assert ksm._knobs() == before
    assert not state.exists()


def test_what_others_use_is_refused(folder, state):
    """An administrator's ksmd is left alone, and so is one told to un-merge."""
    for run, sharing in (("1", "7"), ("2", "0")):
        (folder / "run").write_text(run)
        (folder / "pages_sharing").write_text(sharing)
        before = ksm._knobs()
        with pytest.raises(OSError, match="ksmd is") as caught, ksm.borrowed(state):
            pass
        assert caught.value.errno == errno.EBUSY
        assert ksm._knobs() == before
        assert not state.exists()


def test_knobs_that_somebody_else_turns_are_noticed(folder, state):
    """Then a measurement is worth nothing."""
    with ksm.borrowed(state):
        ksm.open_wide()
        assert ksm.is_wide_open()
        (folder / "sleep_millisecs").write_text("20")
        assert not ksm.is_wide_open()


@pytest.mark.usefixtures("folder")
def test_two_scopes_at_once_are_refused(state):
    """The second would write down what the first has changed."""
    with ksm.borrowed(state):
        with pytest.raises(OSError, match="has ksmd"), ksm.borrowed(state):
            pass
        assert ksm.repair(state) is False
        assert state.exists()


@pytest.mark.usefixtures("folder")
def test_nobody_un_merges_the_whole_machine(state):
    """run=2 is never written, nor is a knob that would not be given back."""
    with ksm.borrowed(state):
        for name, value in (("run", "2"), ("max_page_sharing", "2"), ("../x", "1")):
            with pytest.raises(ValueError, match="not to be written"):
                ksm.tune(name, value)


def test_knobs_that_a_killed_scope_left_are_repaired(folder, state):
    """From the file, once."""
    before = ksm._knobs()
    ksm._write_down(state, before)
    (folder / "pages_to_scan").write_text("1000000")
    (folder / "run").write_text("1")
    assert ksm.repair(state) is True
    assert ksm._knobs() == before
    assert ksm.repair(state) is False


def test_without_ksm_there_is_nothing_to_see(tmp_path, monkeypatch, state):
    """CONFIG_KSM=n."""
    monkeypatch.setattr(ksm, "FOLDER", tmp_path / "nothing")
    assert ksm.figures() == {}
    with pytest.raises(FileNotFoundError), ksm.borrowed(state):
        pass
    assert not state.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="for those who are not root")
@pytest.mark.needs(Feature.KSM)
def test_ordinary_user_may_not_borrow(state):
    """And leaves no file that says so."""
    with pytest.raises(PermissionError), ksm.borrowed(state):
        pass
    assert not state.exists()


@pytest.fixture
def real_knobs():
    """Check and restore the machine's own knobs, whatever the test does."""
    before = ksm._knobs()
    yield before
    for name, value in before.items():
        if ksm._read(name) != value:
            (ksm.FOLDER / name).write_text(value)


@pytest.mark.machine
@pytest.mark.root
@pytest.mark.needs(Feature.KSM)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_gives_the_real_knobs_back(puppets, real_knobs, state, number):
    """The scope ends as it does by an exception."""
    holder = puppets(Holds)
    assert holder.hold(state) == "mine"
    assert ksm._knobs() != real_knobs
    holder.send_signal(number)
    holder.wait(20)
    assert ksm._knobs() == real_knobs
    assert not state.exists()


@pytest.mark.machine
@pytest.mark.root
@pytest.mark.needs(Feature.KSM)
def test_next_start_gives_the_real_knobs_back_after_sigkill(
    puppets, real_knobs, runtime, sksm_program
):
    """Any command does it, and says so."""
    holder = puppets(Holds)
    assert holder.hold(runtime / ksm.STATE_NAME) == "mine"
    sksm_program("stat")
    assert ksm._knobs() != real_knobs  # still held: not to be taken away
    holder.end()
    assert ksm._knobs() != real_knobs
    done = sksm_program("stat")
    assert "gave back the settings of ksmd" in done.stderr
    poll(lambda: ksm._knobs() == real_knobs)
    assert sksm_program("stat").stderr == ""
