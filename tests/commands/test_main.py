"""The promises that hold for every command: exit codes, streams, errors."""

import errno
import os
import subprocess
import sys

import click
import pytest

from sksm.commands import main as program
from sksm.errors import (
    DaemonUnreachable,
    Misconfigured,
    NotPermitted,
    SksmError,
    Unsupported,
)
from tests.commands.conftest import PROGRAM


@pytest.mark.check
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SksmError("so it is"), 1),
        (Misconfigured("so it is"), 2),
        (Unsupported("so it is"), 3),
        (NotPermitted("so it is"), 4),
        (PermissionError(errno.EACCES, "so it is"), 4),
        (OSError(errno.EIO, "so it is"), 1),
        (DaemonUnreachable("so it is"), 5),
        (ZeroDivisionError("so it is"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(sksm_here, monkeypatch, error, code):
    """Nothing on stdout, one line on stderr, no traceback."""
    fails_with(monkeypatch, error)
    result = sksm_here("stat")
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if code != 130:
        assert result.stderr.startswith("sksm: ")
        assert result.stderr.count("\n") == 1
        assert "so it is" in result.stderr


def test_debug_shows_the_traceback(sksm_here, monkeypatch):
    """Also for errors that are expected, and in both places."""
    fails_with(monkeypatch, SksmError("so it is"))
    for args in (("stat", "--debug"), ("--debug", "stat")):
        result = sksm_here(*args)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr


def fails_with(monkeypatch, error):
    @click.command()
    @program.options.output_options
    def command(as_json):
        raise error

    monkeypatch.setattr("sksm.commands.stat.command", command)


@pytest.mark.parametrize(
    "args", [("nonsense",), ("stat", "--nonsense"), ("demo", "--workers", "one")]
)
def test_wrong_usage_exits_with_2(sksm_here, args):
    """And says so on stderr only."""
    result = sksm_here(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage:" in result.stderr


@pytest.mark.parametrize("command", [[], ["demo"], ["estimate"], ["stat"], ["doctor"]])
def test_help_has_an_example(sksm_here, command):
    """-h and --help are the same, and show how to begin."""
    short, long = sksm_here(*command, "-h"), sksm_here(*command, "--help")
    assert short.exit_code == 0
    assert short.stdout == long.stdout
    assert "Example: sksm" in " ".join(short.stdout.split())


def test_version_is_that_of_the_package(sksm_program):
    """One line."""
    assert sksm_program("--version").stdout == "sksm 0.1.0\n"


def test_help_does_not_import_what_only_a_terminal_needs():
    """Help must come at once: rich alone takes 0.1 s to import."""
    script = (
        "import sys; from sksm.commands.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "'sksm.commands.stat'" in done.stderr
    assert "'rich'" not in done.stderr


@pytest.mark.usefixtures("runtime")
def test_reader_that_leaves_is_no_reason_to_complain():
    """`sksm stat | head -0`: not a word on stderr."""
    near, far = os.pipe()
    os.close(near)
    for args in (["stat"], ["stat", "--json"]):
        done = subprocess.run(
            [*PROGRAM, *args], stdout=far, stderr=subprocess.PIPE, timeout=60
        )
        assert done.returncode == 1
        assert done.stderr == b""
    os.close(far)


@pytest.mark.machine  # doctor tries ksmd
@pytest.mark.usefixtures("runtime")
def test_no_colour_where_none_is_wanted(sksm_program):
    """NO_COLOR wins over a terminal that could."""
    wanted = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    wanted.pop("NO_COLOR", None)
    assert "\x1b[3" in sksm_program("doctor", env=wanted).stdout
    plain = sksm_program("doctor", env={**wanted, "NO_COLOR": "1"}).stdout
    assert "\x1b[3" not in plain
