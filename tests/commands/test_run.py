"""`sksm run`: the program takes the place of the command."""

import errno
import os
import signal
import subprocess

import pytest

from sksm.linux import ksm, libc
from tests.commands.conftest import PROGRAM

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not ksm.FOLDER.exists(), reason="the kernel has no KSM"),
]


def running(*command, **popen):
    return subprocess.run(
        [*PROGRAM, "run", *command], capture_output=True, text=True, timeout=60, **popen
    )


def test_all_memory_of_what_is_started_may_merge():
    """Also of what that starts."""
    script = "cat /proc/self/ksm_stat; exit 7"
    done = running("--ksm", "--", "sh", "-c", script)
    assert done.returncode == 7
    assert "ksm_merge_any: yes" in done.stdout


def test_options_of_the_program_are_its_own():
    """From the first word on that is none of ours."""
    done = running("--ksm", "echo", "--ksm", "-n", "--help")
    assert done.stdout == "--ksm -n --help\n"


def test_a_signal_ends_it_as_it_would_end_the_program():
    """There is no process of ours between."""
    done = running("--ksm", "sh", "-c", "kill -TERM $$")
    assert done.returncode == -signal.SIGTERM


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
    done = running("--ksm", program)
    assert done.returncode == code
    assert f"sksm: {program}: {reason}" in done.stderr


def test_a_program_has_to_be_named(sksm_here):
    """Usage."""
    assert sksm_here("run").exit_code == 2
    assert sksm_here("run", "--ksm").exit_code == 2


def test_ksmd_that_is_off_is_told_of():
    """With both ways on: this process's number, and the switch."""
    off = ksm.figures()["run"] == 0
    done = running("--ksm", "sh", "-c", "echo $$")
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


def test_a_kernel_that_forgets_at_exec_is_an_error(sksm_here, monkeypatch):
    """It is tried, not guessed from a version."""
    monkeypatch.setattr(libc, "prctl", lambda *_: 0)
    monkeypatch.setattr(os, "execvp", lambda *_: pytest.fail("started"))
    result = sksm_here("run", "--ksm", "true")
    assert result.exit_code == 3
    assert "6.7" in result.stderr
