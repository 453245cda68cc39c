"""A pytest plugin: no test can hang the run, and those that need the machine get it.

A signal cannot end a test that waits in a system call which the kernel restarts, nor
one that blocks signals. So each process that runs tests has another beside it
(tests/reaper.py), which is told when a test begins and ends. Past the limit that one
kills, with SIGKILL, all that the test process started and itself; under pytest-xdist
another worker takes its place, the test has failed, and the run goes on.

Limits are in seconds: `limit` in pyproject.toml, or the mark `limit` of a test. On a
slow or loaded machine SKSM_TEST_PATIENCE, a factor, makes them longer.

The mark `machine` is for what reads or changes state of the whole machine: these
tests run in one worker, and none beside that of another run of the suite, whosever it
is.
"""

import contextlib
import faulthandler
import fcntl
import json
import mmap
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests import reaper

_MACHINE_WAIT_S = 3600.0  # for other runs; theirs have limits, too
_FAREWELL_S = 30.0  # for reapers that still work when the run is over


def pytest_addoption(parser):
    parser.addini("limit", "seconds that a test may take", default="120")
    about = "what all runs on this machine lock while a test needs it"
    parser.addini("machine_lock", about, default="/")  # which everybody can open


def pytest_configure(config):
    config.addinivalue_line("markers", "limit(seconds): the test may take this long")
    is_worker = hasattr(config, "workerinput")
    if is_worker:
        folder = Path(config.workerinput["watchdog_folder"])
        run = config.workerinput["watchdog_run"]
    else:
        folder = Path(tempfile.mkdtemp(prefix="sksm-watchdog-"))
        run = os.getpid()
        config.pluginmanager.register(_Run(folder), "watchdog-run")
    if is_worker or config.getoption("dist", "no") == "no":
        capture = config.pluginmanager.getplugin("capturemanager")
        shown = capture.global_and_fixture_disabled() if capture else _nothing()
        with shown:
            watched = Watchdog(config, folder, run, None if is_worker else 2)
        config.pluginmanager.register(watched, "watchdog-tests")


_nothing = contextlib.nullcontext


class _Run:
    """In the controller, or the only process: tells of what was ended."""

    def __init__(self, folder):
        self.folder = folder

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput["watchdog_folder"] = str(self.folder)
        node.workerinput["watchdog_run"] = os.getpid()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config, log):
        if config.getoption("dist") != "loadgroup":
            return None
        from tests.scheduling import Scheduling  # noqa: PLC0415  where there is xdist

        return Scheduling(config, log, self.folder)

    def pytest_terminal_summary(self, terminalreporter):
        if hasattr(terminalreporter.config, "workerinput"):
            return
        if not terminalreporter.config.pluginmanager.hasplugin("watchdog-tests"):
            self.await_reapers()
        killed = self.folder / "killed"
        if not killed.exists():
            return
        terminalreporter.section("ended by the watchdog", sep="=", red=True)
        for line in killed.read_text().splitlines():
            first, *rest = reaper.describe(json.loads(line))
            terminalreporter.write_line(first, red=True)
            for more in rest:
                terminalreporter.write_line(more)

    def await_reapers(self):
        """Wait until none works any more, so that none is left and all is told."""
        deadline = time.monotonic() + _FAREWELL_S
        for path in self.folder.glob("*.life"):
            with open(path) as life:
                while time.monotonic() < deadline:
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(life, fcntl.LOCK_SH | fcntl.LOCK_NB)
                        break
                    time.sleep(0.01)

    def pytest_unconfigure(self):
        shutil.rmtree(self.folder, ignore_errors=True)


class Watchdog:
    """In each process that runs tests: says what runs, to the one beside it."""

    def __init__(self, config, folder, run, stderr):
        self.config, self.folder = config, folder
        self.patience = float(os.environ.get("SKSM_TEST_PATIENCE", "1"))
        self.limit = float(config.getini("limit"))
        self.mark = mark = reaper.PREFIX + secrets.token_hex(8)
        self.stacks = os.open(
            folder / f"{mark}.stacks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        )
        self.channel, theirs = socket.socketpair()
        program = reaper.__file__, str(theirs.fileno())
        with theirs:
            subprocess.run(
                # Without the environment's packages, whose import takes time.
                [sys.executable, "-I", "-S", *program, mark, str(folder), str(run)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr if stderr is not None else subprocess.DEVNULL,
                check=True,
            )
        # From here on, what this process starts inherits the mark.
        os.environ[mark] = "1"
        fd = os.memfd_create(mark)
        os.ftruncate(fd, mmap.PAGESIZE)
        self.mapping = mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED)
        os.close(fd)
        self.begins(self.limit, "(collection)")

    def says(self, limit, test):
        # Forked children have the descriptor, too, but none of them comes here.
        self.channel.sendall(json.dumps([limit, test]).encode() + b"\n")

    def begins(self, limit, test):
        limit *= self.patience
        self.says(limit, test)
        # The dump comes from a thread of its own, which needs no lock of Python's. In
        # a process that has no other thread it would change what is tested.
        if len(os.listdir("/proc/self/task")) > 1:
            os.ftruncate(self.stacks, 0)
            early = max(limit * 0.9, limit - 2)
            faulthandler.dump_traceback_later(early, file=self.stacks)

    def ends(self):
        faulthandler.cancel_dump_traceback_later()
        self.says(0, None)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session):
        """Write down, before xdist schedules, which tests need the machine."""
        needed = [i.nodeid for i in session.items if i.get_closest_marker("machine")]
        (self.folder / f"{self.mark}.machine").write_text(json.dumps(needed))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self):
        self.ends()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        mark = item.get_closest_marker("limit")
        limit = float(mark.args[0]) if mark else self.limit
        with self.whole_machine(item):
            self.begins(limit, item.nodeid)
            try:
                return (yield)
            finally:
                self.ends()

    @contextlib.contextmanager
    def whole_machine(self, item):
        """Keep other runs off the machine's state, while a test needs that."""
        if not item.get_closest_marker("machine"):
            yield
            return
        path = self.config.getini("machine_lock")
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.begins(_MACHINE_WAIT_S, f"{item.nodeid} (waits for other runs)")
            fcntl.flock(fd, fcntl.LOCK_EX)
            self.ends()
            yield
            fcntl.flock(fd, fcntl.LOCK_UN)  # a forked child may hold a copy
        finally:
            os.close(fd)

    def pytest_unconfigure(self):
        if not hasattr(self.config, "workerinput"):  # a worker waits for the others
            self.says(self.limit * self.patience, "(end of the run)")
