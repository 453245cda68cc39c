"""What a service manager hears, which the test plays with a socket."""

import math
import os
import socket
import time

import pytest

from sksm.reporters.systemd import Manager
from tests.figures import figures

pytestmark = [pytest.mark.check, pytest.mark.pure]


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """Give the manager's socket, and what the environment calls it."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        if request.param == "abstract":
            listener.bind("\0" + path)
            path = "@" + path
        else:
            listener.bind(path)
        listener.setblocking(False)
        yield listener, path


def heard(listener):
    """List what was said so far."""
    said = []
    try:
        while True:
            said.append(listener.recv(4096).decode())
    except BlockingIOError:
        return said


def test_ready_is_said_once_and_the_status_each_time(manager):
    """The status is one line, and says what is saved."""
    listener, path = manager
    service = Manager({"NOTIFY_SOCKET": path})
    service.tell(figures())
    service.tell(figures(saved_net_bytes=3 << 30))
    ready, first, second = heard(listener)
    assert ready == "READY=1"
    assert first.startswith("STATUS=2.0 MiB saved")
    assert second.startswith("STATUS=3.0 GiB saved")
    assert "\n" not in first + second


def test_a_reload_begins_with_the_time_and_ends_with_ready(manager):
    """As sd_notify(3) wants it: in one datagram, in microseconds."""
    listener, path = manager
    service = Manager({"NOTIFY_SOCKET": path})
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    service.reloading()
    service.ready()
    begin, end = heard(listener)
    word, stamp = begin.split("\n")
    assert (word, end) == ("RELOADING=1", "READY=1")
    assert stamp.startswith("MONOTONIC_USEC=")
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert before <= int(stamp.removeprefix("MONOTONIC_USEC=")) <= now


def test_the_watchdog_hears_of_us_in_less_than_half_its_time(manager):
    """And nothing is said to one that is not there."""
    listener, path = manager
    service = Manager({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "3000000"})
    assert 0.5 < service.alive_seconds < 1.5
    service.alive()
    Manager({"NOTIFY_SOCKET": path}).alive()
    assert heard(listener) == ["WATCHDOG=1"]


def test_a_watchdog_of_another_process_is_not_ours():
    """It was meant for a parent, say."""
    ours, parents = str(os.getpid()), str(os.getppid())
    settings = {"WATCHDOG_USEC": "3000000"}
    assert Manager({**settings, "WATCHDOG_PID": parents}).alive_seconds == math.inf
    assert Manager({**settings, "WATCHDOG_PID": ours}).alive_seconds < math.inf


def test_what_we_start_does_not_inherit_the_manager(manager):
    """A store would speak for us."""
    _, path = manager
    environment = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "1", "WATCHDOG_PID": "2"}
    Manager(environment)
    assert environment == {}


@pytest.mark.parametrize("address", ["", "/nowhere/at/all", "@nobody", "vsock:2:1"])
def test_a_manager_that_is_not_there_is_no_error(address):
    """Nor is none at all."""
    service = Manager({"NOTIFY_SOCKET": address})
    service.tell(figures())
    service.stopping()
