"""Fixtures for tests on other processes: programs that check themselves."""

import shutil

import pytest

from sksm.process.stopping import Threads
from tests.process import programs


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Paths of the compiled programs by name."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    return programs.build(tmp_path_factory.mktemp("targets"))


@pytest.fixture
def target(built):
    """Give `target(name, *args)`: a program that runs; killed at the end."""
    started = []

    def start(name, *args):
        started.append(programs.Target(built[name], *args))
        if started[-1].process.poll() == programs.NO_SUCH_THING:
            pytest.skip(f"this machine has nothing for `{name}` to test")
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def unhurried(monkeypatch):
    """Wait for threads to stop as long as a loaded machine may take to run them.

    No longer: one that waits at the barrier in a system call does not stop at all.
    """
    monkeypatch.setattr(Threads.await_stop, "__defaults__", (2.0,))


@pytest.fixture
def patient(monkeypatch):
    """Wait long for threads to stop: other tests may have the processors."""
    monkeypatch.setattr(Threads.await_stop, "__defaults__", (60.0,))
