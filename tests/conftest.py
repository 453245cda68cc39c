"""What the tests share: memory to play with, a daemon of their own, oracles."""

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import settings

from sksm import session
from sksm.daemon import launch
from sksm.daemon.client import RemoteStore
from sksm.errors import DaemonUnreachable
from sksm.linux import ksm
from sksm.linux.features import missing
from sksm.spans import PAGE_SIZE, Span
from tests.nursery import Nursery
from tests.puppets import Deeds, Puppet
from tests.rows import Memory

pytest_plugins = ["tests.watchdog", "tests.memory", "tests.process.fixtures"]

# How long an example takes depends on what runs beside it.
settings.register_profile("sksm", deadline=None)
settings.load_profile("sksm")

# A shell that starts the tests in the background has them ignore these, and whatever
# they start would, too.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        default = signal.default_int_handler if number == signal.SIGINT else None
        signal.signal(number, default or signal.SIG_DFL)

# In CI every kernel feature must be there: a skip would hide a broken machine.
REQUIRE_KERNEL = os.environ.get("SKSM_REQUIRE_KERNEL") == "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for feature in mark.args:
            if reason := missing(feature):
                (pytest.fail if REQUIRE_KERNEL else pytest.skip)(reason)
    if item.get_closest_marker("root") and os.getuid() != 0:
        pytest.skip("needs root: reads physical frame numbers or kernel-wide state")


@pytest.fixture
def memory():
    """Give `memory(n)`: n fresh private pages of zeros, as `Memory`."""
    return Memory


@pytest.fixture
def anonymous(memory):
    """Give `anonymous(n)`: n fresh private pages, as a Span and a byte matrix."""
    held = []

    def make(pages):
        held.append(memory(pages))
        return held[-1].span, held[-1].rows

    return make


@pytest.fixture
def different():
    """Give `different(n)`: n pages of random bytes, no two alike."""
    generator = np.random.default_rng(os.urandom(8)[0])

    def make(pages):
        return generator.integers(1, 256, (pages, PAGE_SIZE), dtype=np.uint8)

    return make


@pytest.fixture
def pagemap_fd():
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    yield fd
    os.close(fd)


def frames(span: Span, pid: int | str = "self") -> np.ndarray:
    """Physical frame of each page, the oracle for "shared". Reads as root only.

    A page that is merged but not yet mapped has none: read it first.
    """
    table = np.zeros(span.pages, "<u8")
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(span.start // PAGE_SIZE * 8)
        pagemap.readinto(table)
    return np.where(table >> np.uint64(63), table & np.uint64((1 << 55) - 1), 0)


@pytest.fixture(autouse=True)
def _own_runtime():
    """A runtime directory of the test's own, so that it cannot reach the user's daemon.

    Its name is short: the address of a Unix socket holds 107 bytes (unix(7)). A
    daemon that was started there is ended, when all that the test replaced is back.
    """
    path = Path(tempfile.mkdtemp(prefix="sksm-test-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKSM_RUNTIME_DIR", str(path))
        yield path
        for served in path.glob("**/sksmd.sock"):  # other users' are in folders below
            session.current.close()
            end(listener(served))
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def runtime(_own_runtime):
    """The test's runtime directory, of whose daemon no session is left from before."""
    session.current.close()
    yield _own_runtime
    session.current.close()
    end_daemon(_own_runtime)


def daemon_pid(runtime) -> int | None:
    """Find the daemon of a runtime directory by asking it."""
    os.environ["SKSM_RUNTIME_DIR"] = str(runtime)
    try:
        store = RemoteStore(start=False)
    except DaemonUnreachable:
        return None
    with contextlib.closing(store):
        return store.status().pid


def listener(path) -> int | None:
    """Find the process that listens at a socket, by asking the kernel."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        try:
            client.connect(str(path))
        except OSError:  # what is left of one that was killed
            return None
        peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return struct.unpack("3i", peer)[0]


def end_daemon(runtime) -> None:
    end(daemon_pid(runtime))


def end(pid) -> None:
    """End a process, if there is one, that is not this one."""
    if pid not in (None, os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        poll(lambda: ended(pid))


def ended(pid) -> bool:
    """Say whether a process is over, be it that nobody has reaped it yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def poll(condition, seconds=20.0):
    """Wait until `condition()` is true and give its value; fail after a while."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


@pytest.fixture(scope="session")
def _nursery():
    with contextlib.closing(Nursery()) as nursery:
        yield nursery


@pytest.fixture(autouse=True)
def _quick_start(request, monkeypatch, _nursery):
    """Have daemons forked from one that has imported everything already."""
    if not request.node.get_closest_marker("own_start"):
        monkeypatch.setattr(launch, "_spawn", _nursery.spawn)


@pytest.fixture
def puppets(_nursery, request):
    """Give `puppets(kind, *args)`: a forked process that does what it is told.

    It starts daemons, and merges little, as this process does.
    """
    marked = request.node.get_closest_marker
    how = {"own_start": bool(marked("own_start")), "by_gain": bool(marked("by_gain"))}
    started = []

    def start(kind=Deeds, *args):
        started.append(Puppet(_nursery.fork, kind, *args, **how))
        return started[-1]

    yield start
    for one in started:
        one.end()


@pytest.fixture(autouse=True)
def _however_little(_own_runtime, request, monkeypatch):
    """Merge also what is too little to be worth a daemon."""
    if not request.node.get_closest_marker("by_gain"):
        monkeypatch.setattr(RemoteStore, "upkeep_bytes", lambda _: 0)


@pytest.fixture(autouse=True)
def _knobs_of_ksm(request):
    """See that a test which may turn KSM's knobs leaves them as they were."""
    if not request.node.get_closest_marker("machine") or not ksm.FOLDER.exists():
        yield
        return
    before = ksm._knobs()
    yield
    if (after := ksm._knobs()) != before:
        for name, value in before.items():
            if os.access(ksm.FOLDER / name, os.W_OK):
                (ksm.FOLDER / name).write_text(value)
        pytest.fail(f"it left KSM's knobs turned: {after}, and not {before}")


NO_KSM = "ksmd is out of reach"


@pytest.fixture
def no_ksm(monkeypatch):
    """Make KSM no way out, as for all but root."""
    monkeypatch.setattr(ksm, "obstacle", lambda: NO_KSM)


@pytest.fixture
def ksmd_rests():
    """Stop ksmd where somebody has it run: it would merge again what is looked at."""
    run = ksm.FOLDER / "run"
    works = run.exists() and os.access(run, os.W_OK) and run.read_text() == "1\n"
    if works:
        run.write_text("0")
    yield
    if works:
        run.write_text("1")


@pytest.fixture
def foreign():
    """The pid of a program that is root's, and neither ours nor above us."""
    if os.geteuid() == 0:
        pytest.skip("root may look at any process")
    above = {parent.pid for parent in psutil.Process().parents()}
    for one in psutil.process_iter(["uids", "cmdline"]):
        roots = one.info["uids"].effective == 0 and one.info["cmdline"]
        if roots and one.pid not in above:
            return one.pid
    pytest.skip("every program of root's is one above us")


class Worker:
    """A program that is tested as users start it: an interpreter with a script.

    The script reads lines from stdin and prints answers; `ask` does one turn. What
    only has to obey is a puppet (tests/puppets.py), or a `Subject` if nothing of ours
    may be in it (tests/process/subject.py).
    """

    def __init__(self, script: str, *args: str, **popen) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **popen,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, line: str = "") -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        return self.process.stdout.readline().rstrip("\n")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> int:
        self.process.stdin.close()
        code = self.process.wait(30)
        self.process.stdout.close()
        return code


@pytest.fixture
def worker():
    """Give `worker(script, *args)`; what still runs at the end is killed."""
    started = []

    def start(script, *args, **popen):
        started.append(Worker(script, *args, **popen))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()
        one.process.stdin.close()
        one.process.stdout.close()
