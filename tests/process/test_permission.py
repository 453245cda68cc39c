"""What is said of processes that cannot be looked at."""

import errno
import os
import signal

import psutil
import pytest

from sksm.errors import NotPermitted, ProcessGone, SksmError, Unsupported
from sksm.linux import libc
from sksm.process import permission, status
from sksm.process.other import EVERYTHING, OtherProcess
from tests.process.subject import Subject

DENIED = PermissionError(errno.EACCES, "Permission denied")


def fields(**changes):
    usual = {"Uid": "7\t7\t7\t7", "Gid": "8\t8\t8\t8", "NSpid": "5", "CapPrm": "0"}
    return {"Tgid": "5", "State": "S (sleeping)", **usual, "CapEff": "0", **changes}


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Give `pretend(theirs, ours, yama)`: /proc as it would be."""

    def prepare(theirs=None, ours=None, yama=None, owner=7):
        def read(pid):
            return fields(**((ours if pid == os.getpid() else theirs) or {}))

        monkeypatch.setattr(status, "read", read)
        monkeypatch.setattr(permission, "YAMA", tmp_path / "ptrace_scope")
        if yama is not None:
            permission.YAMA.write_text(f"{yama}\n")
        monkeypatch.setattr(
            permission.os,
            "stat",
            lambda _: os.stat_result([0, 0, 0, 0, owner, *[0] * 5]),
        )

    return prepare


ROOT_CAPS = {"CapEff": "1ffffffffff"}
CASES = [
    ({"theirs": {"Uid": "1\t1\t1\t1"}}, "belongs to uid 1"),
    ({"theirs": {"Uid": "7\t1\t7\t7"}, "yama": 1}, "belongs to uid 7"),
    ({"theirs": {"Gid": "9\t9\t9\t9"}}, "belongs to gid 9"),
    ({"owner": 0}, "not dumpable"),
    ({"theirs": {"CapPrm": "400"}}, "capabilities that you lack"),
    ({"yama": 1}, "sysctl -w kernel.yama.ptrace_scope=0"),
    ({"yama": 2}, "lets only root"),
    ({"yama": 3, "ours": ROOT_CAPS}, "until the next boot"),
    ({"yama": 0, "theirs": {"NSpid": "5\t1"}}, "runs in a container"),
    ({"ours": ROOT_CAPS, "yama": 1, "owner": 0}, "security module"),
    ({}, "security module"),
]


@pytest.mark.parametrize(("situation", "words"), CASES)
def test_denial_names_its_reason_and_the_way_out(pretend, situation, words):
    """In the order in which the kernel asks; with the capability it asks no more."""
    pretend(**situation)
    said = permission.explain(5, DENIED)
    assert isinstance(said, NotPermitted)
    assert words in str(said)
    assert str(said).startswith("process 5 may not be looked at: ")


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESRCH])
def test_process_that_is_not_there_is_gone(code):
    """An ordinary outcome."""
    said = permission.explain(ended_pid(), OSError(code, os.strerror(code)))
    assert isinstance(said, ProcessGone)


def test_process_that_ends_while_its_denial_is_explained_is_gone():
    """Nobody is told of permissions then."""
    assert isinstance(permission.explain(ended_pid(), DENIED), ProcessGone)


def ended_pid():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_process_that_proc_hides_is_not_taken_for_gone(monkeypatch):
    """With hidepid its directory is missing, but a signal could be sent."""
    monkeypatch.setattr(permission.Path, "exists", lambda _: False)
    said = permission.explain(os.getpid(), FileNotFoundError(errno.ENOENT, ""))
    assert isinstance(said, NotPermitted)
    assert "hidepid" in str(said)


def test_any_other_failure_keeps_its_words():
    """It is nothing of permissions."""
    said = permission.explain(5, OSError(errno.EIO, "Input/output error"))
    assert type(said) is SksmError
    assert str(said) == "process 5: Input/output error"


def test_a_process_with_memory_is_accepted():
    """The usual case."""
    permission.require_memory(os.getpid())


def test_a_zombie_has_ended():
    """It is still listed, but has no memory."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessGone, match="zombie"):
        permission.require_memory(pid)
    os.waitpid(pid, 0)


def test_a_thread_is_not_a_process(worker):
    """Its process is named."""
    process = Subject(worker)
    (thread,) = process.do("threads(1)")
    with pytest.raises(Unsupported, match=f"thread of process {process.pid}"):
        permission.require_memory(thread)


def test_a_kernel_thread_has_no_memory():
    """Of those there are many; the first is kthreadd."""
    threads = [process.pid for process in psutil.process_iter() if process.ppid() == 2]
    if not threads:
        pytest.skip("no kernel threads to be seen: a PID namespace")
    with pytest.raises(Unsupported, match="kernel thread"):
        permission.require_memory(threads[0])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look at it")
def test_a_process_that_is_not_dumpable_says_so():
    """The kernel gives its files in /proc to root."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        libc.prctl(libc.PR_SET_DUMPABLE, 0, 0, 0, 0)
        os.write(tell, b"x")
        signal.pause()
    os.read(ready, 1)
    try:
        with OtherProcess(pid) as space, pytest.raises(PermissionError) as caught:
            space.mappings(EVERYTHING)
        assert "not dumpable" in str(permission.explain(pid, caught.value))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(tell)


def test_processes_of_others_name_their_owner(foreign):
    """So that one knows who must ask."""
    with OtherProcess(foreign) as space, pytest.raises(PermissionError) as caught:
        space.mappings(EVERYTHING)
    assert "belongs to uid 0" in str(permission.explain(foreign, caught.value))
