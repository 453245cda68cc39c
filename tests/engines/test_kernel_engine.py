"""The kernel engine on a kernel that has MADV_MERGE; `make kernel-test` boots one."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

from sksm.engines import choice
from sksm.linux.features import Feature, missing
from tests.conftest import frames

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(bool(missing(Feature.MADV_MERGE)), reason="no MADV_MERGE"),
]
PAGES = 64


def told(*args):
    """Run a command of sksm; gives what it tells in JSON."""
    command = [sys.executable, "-m", "sksm.commands.main", *args, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def forked():
    """Give `forked(act)`: a process that does `act()`, and then nothing more."""
    with contextlib.ExitStack() as stack:

        def fork(act=lambda: None):
            ready, tell = os.pipe()
            if (pid := os.fork()) == 0:
                act()
                os.write(tell, b".")
                while True:
                    signal.pause()
            stack.callback(os.waitpid, pid, 0)
            stack.callback(os.kill, pid, signal.SIGKILL)
            assert os.read(ready, 1)
            os.close(ready)
            os.close(tell)
            return pid

        yield fork


def test_it_is_what_auto_takes(forked):
    """No other is as fast, and none leaves MADV_DONTNEED as it is."""
    assert choice.choose(forked()) == (choice.KERNEL, "")


def test_doctor_shows_it_at_work():
    """It merges two pages to find out."""
    doctor = told("doctor")
    (feature,) = (one for one in doctor["features"] if one["name"] == "MADV_MERGE")
    assert feature["works"], feature["reason"]
    (way,) = (one for one in doctor["engines"] if one["name"] == "kernel")
    assert way["works"], way["reason"]


def test_other_processes_are_merged(forked, area, different):
    """By `sksm merge`, which leaves the last page of a mapping alone, as ever."""
    one = area(PAGES)
    one.rows[:] = content = different(PAGES)

    def write():
        one.rows[:] = content  # pages of its own now

    pids = [forked(write) for _ in range(2)]
    merged = told("merge", "--engine", "auto", *map(str, pids))
    assert {process["engine"] for process in merged["processes"]} == {"kernel"}
    for outcome in ("merged", "stored"):  # one of two twins is the frame's own
        assert sum(process[outcome] for process in merged["processes"]) >= PAGES - 1
    here, there = (frames(one.span, pid)[:-1] for pid in pids)
    assert here.all()
    assert (here == there).all()
    assert (one.rows == content).all()
