"""`sksm run`: the program takes the place of the command."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from sksm import ancestry, running
from sksm.commands.main import main
from sksm.daemon import protocol
from sksm.daemon.client import RemoteStore
from sksm.errors import SksmError
from sksm.linux import ksm, libc, notify
from sksm.process import permission
from tests.commands.conftest import PROGRAM

with_ksm = pytest.mark.skipif(not ksm.FOLDER.exists(), reason="no KSM")


def by_ksm(test):
    """Mark a test that has the kernel merge all memory."""
    return pytest.mark.machine(pytest.mark.root(with_ksm(test)))


def ksm_run(*command, **popen):
    return subprocess.run(
        [*PROGRAM, "run", *command], capture_output=True, text=True, timeout=60, **popen
    )


@by_ksm
def test_all_memory_of_what_is_started_may_merge():
    """Also of what that starts."""
    script = "cat /proc/self/ksm_stat; exit 7"
    done = ksm_run("--ksm", "--", "sh", "-c", script)
    assert done.returncode == 7
    assert "ksm_merge_any: yes" in done.stdout


@by_ksm
def test_options_of_the_program_are_its_own():
    """From the first word on that is none of ours."""
    done = ksm_run("--ksm", "echo", "--ksm", "-n", "--help")
    assert done.stdout == "--ksm -n --help\n"


@by_ksm
def test_a_signal_ends_it_as_it_would_end_the_program():
    """There is no process of ours between."""
    done = ksm_run("--ksm", "sh", "-c", "kill -TERM $$")
    assert done.returncode == -signal.SIGTERM


@by_ksm
@pytest.mark.parametrize(
    ("program", "code", "reason"),
    [
        ("no-such-program", 127, "No such file"),
        ("/etc/passwd", 126, "Permission denied"),
        ("/etc/passwd/x", 127, "Not a directory"),
    ],
)
def test_what_cannot_be_started_is_told_as_shells_do(program, code, reason):
    """With the reason."""
    done = ksm_run("--ksm", program)
    assert done.returncode == code
    assert f"sksm: {program}: {reason}" in done.stderr


def test_a_program_has_to_be_named(sksm_here):
    """Usage."""
    assert sksm_here("run").exit_code == 2
    assert sksm_here("run", "--ksm").exit_code == 2


@by_ksm
def test_ksmd_that_is_off_is_told_of():
    """With both ways on: this process's number, and the switch."""
    off = ksm.figures()["run"] == 0
    done = ksm_run("--ksm", "sh", "-c", "echo $$")
    assert (f"--engine ksm {done.stdout.strip()}" in done.stderr) == off


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [(errno.EPERM, 4, "CAP_SYS_RESOURCE"), (errno.EINVAL, 3, "Linux 6.4")],
)
def test_a_kernel_that_refuses_is_an_error(
    sksm_here, monkeypatch, code, exit_code, words
):
    """And nothing is started."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(libc, "prctl", refuse)
    monkeypatch.setattr(os, "execvp", lambda *_: pytest.fail("started"))
    result = sksm_here("run", "--ksm", "true")
    assert result.exit_code == exit_code
    assert words in result.stderr


@pytest.fixture
def no_program(monkeypatch):
    """Give the patch; stop where the program would start, with no filter put on."""
    monkeypatch.setattr(running, "answered", lambda: False)
    monkeypatch.setattr(running, "let_merge", lambda: None)
    monkeypatch.setattr(running, "execute", lambda _: sys.exit(0))
    return monkeypatch


@pytest.mark.parametrize(
    ("scope", "capability", "below"),
    # Number 63 is one that nobody has, and 0 one that root has.
    [
        ("0", 63, 0),
        ("1", 63, 1),
        ("2", 63, 0),
        pytest.param("1", 0, 0, marks=pytest.mark.root),
    ],
)
def test_where_only_ancestors_may_trace_the_program_runs_below(
    no_program, tmp_path, scope, capability, below
):
    """Else it takes our place, if the daemon's child may trace it."""
    ran = []
    (tmp_path / "scope").write_text(scope)
    no_program.setattr(permission, "YAMA", tmp_path / "scope")
    no_program.setattr(permission, "CAP_SYS_PTRACE", capability)
    no_program.setattr(ancestry, "run", ran.append)
    assert CliRunner().invoke(main, ["run", "true"]).exit_code == 0
    assert ran == [("true",)] * below


def test_code_that_cannot_merge_is_told(sksm_here, no_program):
    """With what would change it."""
    no_program.setattr(running, "missing", lambda feature: f"{feature.value}: no")
    told = sksm_here("run", "true").stderr
    assert told == "sksm: executable memory cannot merge: memfd, executable: no\n"


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [
        (errno.EBUSY, 3, "the kernel allows one"),
        (errno.EACCES, 4, "Permission denied"),
        (errno.EINVAL, 3, "Linux 5.0"),
    ],
)
@pytest.mark.usefixtures("runtime")
def test_a_kernel_that_lets_nobody_listen_is_an_error(
    sksm_here, monkeypatch, code, exit_code, words
):
    """And nothing is started."""

    def refuse():
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(libc, "prctl", lambda *_: 0)
    monkeypatch.setattr(running, "answered", lambda: False)
    monkeypatch.setattr(notify, "listen", refuse)
    monkeypatch.setattr(os, "execvp", lambda *_: pytest.fail("started"))
    result = sksm_here("run", "true")
    assert result.exit_code == exit_code
    assert words in result.stderr


@pytest.mark.usefixtures("runtime")
def test_a_program_that_nobody_may_trace_is_not_started(sksm_here, monkeypatch):
    """The daemon finds out (scope 2 of Yama, say), and the command tells."""
    hear = RemoteStore._hear

    def refused(store, kind, fds=0):
        if kind is protocol.Supervised:
            raise SksmError("sksmd refused: for a reason")
        return hear(store, kind, fds)

    monkeypatch.setattr(RemoteStore, "_hear", refused)
    monkeypatch.setattr(libc, "prctl", lambda *_: 0)
    monkeypatch.setattr(running, "answered", lambda: False)
    monkeypatch.setattr(notify, "listen", lambda: os.open(os.devnull, os.O_RDONLY))
    monkeypatch.setattr(os, "execvp", lambda *_: pytest.fail("started"))
    result = sksm_here("run", "true")
    assert result.exit_code == 4
    assert "for a reason" in result.stderr


def test_a_kernel_that_forgets_at_exec_is_an_error(sksm_here, monkeypatch):
    """It is tried, not guessed from a version."""
    monkeypatch.setattr(libc, "prctl", lambda *_: 0)
    monkeypatch.setattr(os, "execvp", lambda *_: pytest.fail("started"))
    result = sksm_here("run", "--ksm", "true")
    assert result.exit_code == 3
    assert "6.7" in result.stderr
