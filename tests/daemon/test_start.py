"""The first user starts the daemon, and nobody notices."""

import contextlib
import os
import resource
import socket
import tempfile
from pathlib import Path

import psutil
import pytest

import sksm
from sksm.daemon import launch
from sksm.daemon.client import RemoteStore
from sksm.errors import DaemonUnreachable, NotPermitted, SksmError
from tests.conftest import Memory, daemon_pid
from tests.rows import content
from tests.support import in_child

pytestmark = pytest.mark.own_start

# Started as users have it: the first import, the first connection, the first daemon.
PROGRAM = """
import os, sys, numpy as np, sksm
data = sksm.empty((32, 4096), np.uint8)
data[:] = np.random.default_rng(7).integers(1, 256, data.shape, np.uint8)
before = data.tobytes()
report = sksm.merge(data)
try:
    os.wait()
    child = "a child"
except ChildProcessError:
    child = "no child"
print(report.stored, report.merged, data.tobytes() == before, child, flush=True)
sys.stdin.read()
"""


def daemons_of(runtime):
    """List the daemons of a runtime directory, from /proc."""
    named = f"SKSM_RUNTIME_DIR={runtime}".encode()
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "sksm.daemon" in (process.info["cmdline"] or []):
            with contextlib.suppress(OSError):  # another user's, or gone
                environment = Path(f"/proc/{process.pid}/environ").read_bytes()
                if named in environment.split(b"\0"):
                    found.append(process.pid)
    return found


def test_two_programs_started_apart_share_with_no_set_up(runtime, worker):
    """The first one stores, the second one merges; neither has a child."""
    first, second = worker(PROGRAM), worker(PROGRAM)

    answers = sorted([first.answer(), second.answer()])

    assert answers == ["0 32 True no child", "32 0 True no child"]


def test_daemon_is_nobodys_child_and_no_zombie(runtime, worker):
    """It belongs to init, in a session of its own, from its first moment."""
    program = worker(PROGRAM)
    program.answer()

    daemon = psutil.Process(daemon_pid(runtime))

    assert daemon.ppid() not in (program.pid, os.getpid())
    assert os.getsid(daemon.pid) == daemon.pid
    assert daemon.status() != psutil.STATUS_ZOMBIE
    assert psutil.Process(program.pid).children() == []
    program.end()
    assert daemon.is_running()


def test_sixteen_first_users_start_exactly_one_daemon(runtime, puppets):
    """Whoever loses the race finds the winner's socket."""
    users = [puppets() for _ in range(16)]
    for one in users:  # all are told before the first one answers
        one.tell("daemon")
    found = {one.hear() for one in users}
    assert len(found) == 1
    assert daemons_of(runtime) == list(found)


def test_a_socket_that_nobody_serves_is_replaced(runtime):
    """A daemon that was killed leaves its socket behind."""
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(str(runtime / "sksmd.sock"))
    stale.close()

    some = Memory(4)
    some.rows[:] = content(1, 4)

    assert sksm.merge(some.rows).stored == 4


def refusal(kind, match):
    """A merge is refused like this, and the memory is as it was."""
    some = Memory(4)
    some.rows[:] = content(1, 4)
    with pytest.raises(kind, match=match):
        sksm.merge(some.rows)
    assert (some.rows == content(1, 4)).all()


@pytest.mark.root
def test_the_socket_of_another_user_is_refused(runtime):
    """Who listens there could be anybody; the message names the uid and the file."""
    path = runtime / "sksmd.sock"
    theirs = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.bind(str(path))
    os.seteuid(65534)
    try:
        theirs.listen()  # SO_PEERCRED tells who did this
    finally:
        os.seteuid(0)

    refusal(NotPermitted, f"{path} belongs to uid 65534")
    theirs.close()


@pytest.mark.root
def test_a_socket_that_may_not_be_opened_is_refused_with_its_name():
    """An ordinary user meets root's socket in his own directory."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as theirs:
            theirs.bind(f"{name}/sksmd.sock")
            os.chmod(f"{name}/sksmd.sock", 0o600)
            theirs.listen()
            os.seteuid(65534)
            try:
                with pytest.raises(NotPermitted, match="belongs to somebody else"):
                    launch._try(f"{name}/sksmd.sock")
            finally:
                os.seteuid(0)


def test_a_runtime_directory_that_others_may_write_to_is_refused(runtime):
    """Anybody could put a socket there."""
    runtime.chmod(0o777)
    refusal(NotPermitted, "only you can write to.*SKSM_RUNTIME_DIR")
    runtime.chmod(0o700)


@pytest.mark.root
def test_a_runtime_directory_of_somebody_else_is_refused(runtime):
    """Its owner could replace the socket."""
    os.chown(runtime, 65534, 65534)
    refusal(NotPermitted, "only you can write to")
    os.chown(runtime, 0, 0)


@pytest.mark.parametrize("kind", ["file", "link", "nowhere"])
def test_what_is_no_directory_is_refused_as_runtime_directory(
    runtime, monkeypatch, kind
):
    """A file, a link to elsewhere, a path that cannot be made."""
    path = runtime / kind
    if kind == "file":
        path.write_text("")
    elif kind == "link":
        path.symlink_to(runtime)
    else:
        path = path / "below"
    monkeypatch.setenv("SKSM_RUNTIME_DIR", str(path))
    refusal(NotPermitted, "SKSM_RUNTIME_DIR")


def test_a_runtime_directory_with_too_long_a_name_is_refused(runtime, monkeypatch):
    """The address of a Unix socket holds 107 bytes (unix(7))."""
    path = runtime / ("x" * 120)
    monkeypatch.setenv("SKSM_RUNTIME_DIR", str(path))
    refusal(SksmError, "too long.*SKSM_RUNTIME_DIR")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["false"], "could not be started"),
        (["/nowhere/sksmd"], "could not be started"),
        (["true"], "ended at once: see .*sksmd.log"),
    ],
)
def test_a_daemon_that_does_not_start_is_an_error_and_no_obstacle(
    runtime, monkeypatch, command, message
):
    """It fails at once, it is not there, it is gone before it serves."""
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_command", lambda: command)
        refusal(DaemonUnreachable, message)

    some = Memory(4)
    assert sksm.merge(some.rows).scanned == 4


def test_the_pool_is_not_left_to_programs_that_are_executed(runtime):
    """Its descriptor, and the connection's, are close-on-exec."""
    with contextlib.closing(RemoteStore()) as store, store.granted():
        assert not os.get_inheritable(store.pool)
        assert not store._connection.get_inheritable()


@pytest.mark.check
def test_the_pool_cannot_be_written_by_a_client(runtime):
    """It comes read-only; a shared mapping of it cannot be made writable."""
    with contextlib.closing(RemoteStore()) as store, store.granted():
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(store.pool, b"x", 0)
        assert os.fstat(store.pool).st_mode & 0o777 == 0o444


@pytest.mark.root
def test_the_daemon_is_not_bound_by_what_binds_its_first_user(runtime):
    """Limits, priority, processors, groups, and being the first to be killed."""

    def impose():
        os.nice(7)
        os.sched_setaffinity(0, {0})
        os.setgroups([1, 2])
        Path("/proc/self/oom_score_adj").write_text("700")
        for which in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_CPU):
            hard = resource.getrlimit(which)[1]
            resource.setrlimit(which, (1 << 45, hard))  # more than the child has
        sksm.merge(Memory(4).rows)

    in_child(impose)
    pid = daemon_pid(runtime)
    assert os.getpriority(os.PRIO_PROCESS, pid) == 0
    assert os.sched_getaffinity(pid) == os.sched_getaffinity(0)
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "0\n"
    assert psutil.Process(pid).terminal() is None
    for which in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_CPU):
        soft, hard = resource.prlimit(pid, which)
        assert soft == hard
    groups = Path(f"/proc/{pid}/status").read_text().partition("Groups:")[2]
    assert groups.partition("\n")[0].split() == []


def test_a_file_size_limit_refuses_only_what_is_above_it(runtime):
    """The pool's file grows in steps, of which none is longer than the limit."""

    def limit_and_merge():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, 1 << 22))
        some = Memory(512)
        some.rows[:] = content(1, 512)
        assert sksm.merge(some.rows).stored == 512
        more = Memory(1024)
        more.rows[:] = content(2, 1024)
        report = sksm.merge(more.rows)
        assert report.refused > 0
        assert any("pool" in reason for reason in report.reasons)
        assert (more.rows == content(2, 1024)).all()

    in_child(limit_and_merge)
