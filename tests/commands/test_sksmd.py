"""`sksmd` as a service manager runs it, with sockets and processes of the test."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from sksm.daemon import launch
from sksm.daemon.client import RemoteStore
from sksm.linux.features import Feature
from tests.commands.conftest import PROGRAM
from tests.conftest import daemon_pid, poll
from tests.process.holder import Holder
from tests.reporters.test_metrics import free_port, scraped
from tests.scanner.test_scanner import inside, merged

SKSMD = [sys.executable, "-m", "sksm.commands.sksmd"]
pytestmark = pytest.mark.usefixtures("runtime")
on_processes = pytest.mark.needs(
    Feature.USERFAULTFD_WP_ASYNC, Feature.PTRACE_SEIZE, Feature.PIDFD_GETFD
)
SAME = list(range(1, 101))
NOBODY = '[[watch]]\nname = "no-such-program"\n'


class Service:
    """sksmd under a manager, which is the test."""

    def __init__(self, folder, text, **environment):
        self.file = folder / "config.toml"
        self._log = folder / "log"
        self.configure(text)
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._line.bind(str(folder / "notify"))
        self._line.setblocking(False)
        self.heard = []
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*SKSMD, "--config", str(self.file)],
                env={
                    **os.environ,
                    "NOTIFY_SOCKET": str(folder / "notify"),
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stderr=log,
            )

    def configure(self, text):
        self.file.write_text(text)
        self.file.chmod(0o600)

    def count(self, start):
        """Say how many datagrams that begin so came up to now."""
        while True:
            try:
                self.heard.append(self._line.recv(4096).decode())
            except BlockingIOError:
                return sum(one.startswith(start) for one in self.heard)

    def await_one(self, start):
        """Wait for the next such datagram."""
        before = self.count(start)
        poll(lambda: self.count(start) > before)

    def ready(self):
        poll(lambda: self.count("READY=1") or self.process.poll() is not None)
        assert self.count("READY=1"), self.log()
        return self

    def reload(self):
        """Have it read its configuration, and wait until it has."""
        begun, done = self.count("RELOADING=1"), self.count("READY=1")
        self.process.send_signal(signal.SIGHUP)
        poll(lambda: self.count("READY=1") > done)
        assert self.count("RELOADING=1") == begun + 1

    def log(self):
        return self._log.read_text()

    def end(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._line.close()


@pytest.fixture
def service(tmp_path):
    """Give `service(text, **environment)`: sksmd with that configuration."""
    started = []

    def start(text, **environment):
        started.append(Service(tmp_path, text, **environment))
        return started[-1]

    yield start
    for one in started:
        one.close()


def watching(*holders):
    return "".join(f"[[watch]]\npid = {one.pid}\n" for one in holders)


def test_without_rules_it_says_what_is_missing(tmp_path):
    """The file, and an example; as wrong usage."""
    file = tmp_path / "config.toml"
    file.write_text("quiet_seconds = 5\n")
    file.chmod(0o600)
    done = subprocess.run(
        [*SKSMD, "--config", file], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("sksmd: nobody to watch")
    assert f"no [[watch]] in {file}." in done.stderr
    assert 'name = "gunicorn*"' in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args", [["--config", "/no/such/file"], ["--config", "/dev/null", "--idle=1"]]
)
def test_wrong_usage_exits_with_2(args):
    """A file that is not there; a store, which has no configuration."""
    done = subprocess.run([*SKSMD, *args], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: sksmd" in done.stderr


def test_a_wrong_configuration_is_told_by_its_line(service):
    """And nobody is told that it is ready."""
    one = service(NOBODY + "cpu_precent = 3\n")
    assert one.process.wait(60) == 2
    assert one.log().startswith(f"sksmd: {one.file}:3: ")
    assert one.count("") == 0


def test_a_port_that_is_taken_is_told_by_its_setting(service):
    """In the form of the log."""
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
        one = service(f'metrics = "{port}"\nlog = "json"\n{NOBODY}')
        assert one.process.wait(60) == 2
    found = json.loads(one.log())
    assert found["level"] == "error"
    assert f'metrics = "{port}"' in found["message"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_ready_after_an_epoch_and_ends_when_told_to(service, number):
    """With success, and it says so beforehand."""
    one = service(NOBODY).ready()
    one.await_one("STATUS=")
    assert one.end(number) == 0
    assert one.count("STOPPING=1") == 1
    assert all(line.startswith("<6>sksmd ") for line in one.log().splitlines())


def test_the_watchdog_hears_of_it_more_often_than_there_are_epochs(service):
    """While it waits, that is."""
    one = service(NOBODY, WATCHDOG_USEC="100000").ready()
    poll(lambda: one.count("WATCHDOG=1") > 20)
    assert one.count("STATUS=") < one.count("WATCHDOG=1") / 2


@on_processes
def test_what_is_merged_stays_merged_when_it_ends(service, puppets):
    """And every byte is what it was; the log and the metrics tell of it."""
    one, two = Holder(puppets, SAME), Holder(puppets, SAME)
    sums = one.ask("sum"), two.ask("sum")
    port = free_port()
    settings = f'quiet_seconds = 1\nmetrics = "{port}"\nlog = "json"\n'
    sksmd = service(settings + watching(one, two)).ready()

    poll(lambda: merged(one.pid, inside(one)) == merged(two.pid, inside(two)) == 100)
    sksmd.await_one("STATUS=")
    # One that could not be stopped for a moment is watched anew.
    poll(lambda: scraped(port)["sksm_processes",] == 2)
    figures = scraped(port)
    assert sksmd.end() == 0

    assert merged(one.pid, inside(one)) == merged(two.pid, inside(two)) == 100
    assert (one.ask("sum"), two.ask("sum")) == sums
    assert figures["sksm_merged_bytes",] >= 200 * 4096
    assert figures["sksm_stop_seconds_count",] > 0
    told = [json.loads(line) for line in sksmd.log().splitlines()]
    assert {x["pid"] for x in told if "is watched" in x["message"]} == {
        one.pid,
        two.pid,
    }


@on_processes
def test_counters_do_not_fall_when_a_process_ends(service, puppets):
    """What was counted of it stays counted."""
    one, two = Holder(puppets, SAME), Holder(puppets, SAME)
    port = free_port()
    settings = f'quiet_seconds = 1\nmetrics = "{port}"\n'
    sksmd = service(settings + watching(one, two)).ready()
    poll(lambda: merged(one.pid, inside(one)) == 100)
    sksmd.await_one("STATUS=")  # what is written to in a merge goes unnoticed
    for index in range(80):
        one.ask("put", index, index + 1)
    sksmd.reload()  # it looks at once then
    poll(lambda: scraped(port)["sksm_unmerged_pages_total",] >= 80)
    before = scraped(port)
    one.process.end()
    sksmd.reload()
    poll(lambda: scraped(port)["sksm_processes",] == 1)
    after = scraped(port)
    for name in before:
        if name[0].endswith(("_total", "_count", "_sum", "_bucket")):
            assert after[name] >= before[name]
    assert f"process {one.pid} (python" in sksmd.log()
    assert "is watched no more" in sksmd.log()


@on_processes
def test_a_reload_that_is_wrong_is_told_and_changes_nothing(service, puppets):
    """By file and line; a right one takes effect then."""
    one, two = Holder(puppets, SAME), Holder(puppets, SAME)
    settings = "quiet_seconds = 1\n"
    sksmd = service(settings + watching(one)).ready()
    sksmd.configure("quiet_seconds = 0\n" + watching(one, two))
    sksmd.reload()
    wrong = f"<3>the configuration stays as it was: {sksmd.file}:1: quiet_seconds"
    assert wrong in sksmd.log()
    sksmd.configure(settings)
    sksmd.reload()
    assert "<3>the configuration stays as it was: nobody to watch" in sksmd.log()
    assert f"process {two.pid} " not in sksmd.log()

    sksmd.configure(settings + watching(one, two))
    sksmd.reload()

    poll(lambda: merged(one.pid, inside(one)) == merged(two.pid, inside(two)) == 100)
    assert "was read anew: 2 rules" in sksmd.log()
    assert sksmd.log().count(f"process {one.pid} ") == 1
    assert sksmd.end() == 0


def test_with_a_stores_options_it_is_a_store(runtime):
    """As before; from the environment, they are for those that it starts."""
    process = subprocess.Popen(
        [*SKSMD, "--idle=600"], env={**os.environ, "SKSM_IDLE_SECONDS": "5"}
    )
    try:
        poll(lambda: daemon_pid(runtime) == process.pid)
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_a_client_can_start_a_store_by_it(runtime, monkeypatch):
    """Where the interpreter is part of a program, and no `python` can be run."""
    monkeypatch.setattr(launch, "_command", lambda: SKSMD)
    store = RemoteStore()
    try:
        assert store.keeper == daemon_pid(runtime)
    finally:
        store.close()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
)
def test_watch_ends_with_the_status_of_its_signal(number, code):
    """0 if it was ended as is meant to be, else what shells expect."""
    command = [*PROGRAM, "watch", "--name", "no-such-program", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert json.loads(process.stdout.readline())["command"] == "watch"
        process.send_signal(number)
        assert process.wait(60) == code
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
