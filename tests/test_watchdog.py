"""The suite cannot hang, and leaves nothing: runs of tiny suites, from outside."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import reaper
from tests.conftest import poll

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[1]

STUCK = """
import os, signal, subprocess, sys, time
from pathlib import Path
import pytest

def test_before(): pass

@pytest.mark.limit(1)
def test_stuck():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    while True:
        time.sleep(60)

@pytest.mark.limit(1)
@pytest.mark.parametrize("program", [True, False])
def test_with_a_daemon(program):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 100)
            Path(f"daemon-{program}").write_text(str(os.getpid()))
            if program:
                os.execv(sys.executable, [sys.executable, "-c", "input() if 0 else __import__('time').sleep(900)"])
            time.sleep(900)
        os._exit(0)
    time.sleep(900)

def test_after(): pass
"""  # noqa: E501

FINE = """
import subprocess, sys
import pytest

@pytest.mark.parametrize("n", range(4))
def test_fine(n):
    subprocess.run([sys.executable, "-c", ""], check=True)
"""

LEAVES = """
import subprocess, sys
from pathlib import Path

def test_leaves_something():
    one = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"],
                           start_new_session=True)
    Path("left").write_text(str(one.pid))

def test_waits():
    import os, time
    Path("worker").write_text(str(os.getpid()))
    time.sleep(900)
"""


class Suite:
    """A suite of one file, and the processes of its run."""

    def __init__(self, folder, text):
        self.folder = folder
        (folder / "conftest.py").write_text('pytest_plugins = ["tests.watchdog"]\n')
        (folder / "pytest.ini").write_text(
            f"[pytest]\nlimit = 60\nmachine_lock = {folder}\n"
        )
        (folder / "test_it.py").write_text(text)
        # By which its processes are known, however they are started.
        self.mark = f"SUITE_AT={folder}"

    def start(self, *options, **environment):
        folder = str(self.folder)
        changed = {"PYTHONPATH": str(ROOT), "SUITE_AT": folder, "TMPDIR": folder}
        command = [sys.executable, "-m", "pytest", "-p", "no:randomly"]
        return subprocess.Popen(
            [*command, "-p", "no:cacheprovider", *options],
            cwd=self.folder,
            env={**os.environ, **changed, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *options, **environment):
        process = self.start(*options, **environment)
        text, _ = process.communicate(timeout=60)
        return process.returncode, text

    def left(self):
        """List the processes of the run that still are there."""
        found = []
        for pid in reaper.parents():
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if self.mark.encode() in variables:
                found.append(pid)
        return found

    def pid(self, name):
        """Read the pid that a test has written down."""
        path = self.folder / name
        return int(poll(lambda: path.exists() and path.read_text()))


@pytest.fixture
def suite(tmp_path):
    """Give `suite(text)`; what its run leaves is ended."""
    made = []

    def make(text):
        made.append(Suite(tmp_path, text))
        return made[-1]

    yield make
    for one in made:
        for pid in one.left():
            psutil.Process(pid).kill()


def assert_nothing_is_left(suite):
    """Neither a process nor the directory of the run."""
    poll(lambda: suite.left() == [])
    poll(lambda: list(suite.folder.glob("sksm-watchdog-*")) == [])


@pytest.mark.parametrize("workers", [1, 3])
def test_a_test_that_no_signal_ends_is_ended_and_the_run_goes_on(suite, workers):
    """It is named, with its stack; so are daemons that left session and parent."""
    stuck = suite(STUCK)
    how = [f"-n{workers}", "--dist=loadgroup", "--max-worker-restart=9"]
    code, text = stuck.run(*how)
    assert code == 1, text
    assert re.search(r"3 failed, 2 passed", text), text
    assert "crashed while running 'test_it.py::test_stuck'" in text
    assert "WATCHDOG test_it.py::test_stuck: not done after 1 s, 1 processes" in text
    assert re.search(r"test_it.py\", line \d+ in test_stuck", text), text
    for program in (True, False):
        name = f"test_it.py::test_with_a_daemon[{program}]"
        assert f"WATCHDOG {name}: not done after 1 s, 2 processes" in text
        pid = stuck.pid(f"daemon-{program}")
        assert pid not in reaper.parents()
    assert stuck.left() == []


def test_without_workers_the_run_dies_and_says_why(suite):
    """The next tests do not run."""
    stuck = suite(STUCK)
    code, text = stuck.run()
    assert code == -9
    assert "WATCHDOG test_it.py::test_stuck: not done after 1 s" in text
    assert_nothing_is_left(stuck)


@pytest.mark.parametrize("options", [("-n2",), ()])
def test_a_run_in_which_nothing_hangs_leaves_no_process(suite, options):
    """Nor a directory."""
    fine = suite(FINE)
    code, text = fine.run(*options)
    assert code == 0, text
    assert "WATCHDOG" not in text
    assert_nothing_is_left(fine)


@pytest.mark.parametrize("victim", ["worker", "run"])
def test_a_worker_that_is_killed_leaves_nothing(suite, victim):
    """Be it that the whole run is killed with it."""
    leaving = suite(LEAVES)
    process = leaving.start("-n1", "--max-worker-restart=0")
    worker, left = leaving.pid("worker"), leaving.pid("left")
    assert {worker, left} <= set(leaving.left())
    if victim == "run":
        process.kill()
    psutil.Process(worker).kill()
    assert process.wait(60) != 0
    process.stdout.close()
    assert_nothing_is_left(leaving)


def test_patience_makes_limits_longer(suite):
    """By a factor."""
    code, text = suite(STUCK).run("-k", "test_stuck", SKSM_TEST_PATIENCE="1.5")
    assert code == -9
    assert "not done after 1.5 s" in text


def test_only_what_has_the_mark_is_ended(worker):
    """Not what runs beside it, nor what has the name elsewhere."""
    mark = reaper.PREFIX + "of_this_test"
    script = "print('here', flush=True); input()"
    other = worker(script, mark)
    named = worker(script, env={**os.environ, "OTHER": f"{mark}=1"})
    marked = worker(script, env={**os.environ, mark: "1"})
    assert {one.answer() for one in (other, named, marked)} == {"here"}
    assert reaper.end_all(mark.encode()) == 1
    assert marked.process.wait(20) == -9
    assert (other.process.poll(), named.process.poll()) == (None, None)


MACHINE = """
import os
from pathlib import Path
import pytest

@pytest.mark.machine
@pytest.mark.parametrize("n", range(6))
def test_one_at_a_time(n):
    with open("workers", "a") as told:
        print(os.getpid(), file=told)
    os.close(os.open("busy", os.O_CREAT | os.O_EXCL))
    os.sched_yield()
    os.unlink("busy")

@pytest.mark.parametrize("n", range(20))
def test_other(n): pass
"""


def test_tests_that_need_the_machine_run_in_one_worker(suite):
    """And in no other run meanwhile."""
    runs = [suite(MACHINE) for _ in range(2)]
    started = [one.start("-n3", "--dist=loadgroup") for one in runs]
    texts = [one.communicate(timeout=100)[0] for one in started]
    assert [one.returncode for one in started] == [0, 0], texts
    workers = (runs[0].folder / "workers").read_text().split()
    assert len(workers) == 12
    assert len({*workers}) == 2
