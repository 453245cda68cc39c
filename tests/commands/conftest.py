"""How the commands are run: in this process, and as a user runs them."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from sksm.commands.main import main

PROGRAM = [sys.executable, "-m", "sksm.commands.main"]


@pytest.fixture
def sksm_here():
    """Give `sksm_here(*args)`: run in this process; a result with exit_code."""
    return lambda *args: CliRunner().invoke(main, args)


@pytest.fixture
def sksm_program():
    """Give `sksm_program(*args)`: run as a program; a CompletedProcess."""

    def run(*args, **options):
        return subprocess.run(
            [*PROGRAM, *args], capture_output=True, text=True, timeout=100, **options
        )

    return run


@pytest.fixture
def in_80_columns(monkeypatch):
    """Print as on a terminal of that width, also on a pipe."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def answer_of():
    """Give `answer_of(text)`: the one JSON object in it, of the schema promised."""

    def parse(text):
        found = json.loads(text)
        assert found["schema"] == 1
        return found

    return parse


@pytest.fixture
def data_file(tmp_path):
    """A file of 8 MiB, no two pages alike, that anybody may read."""
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(8 << 20))
    return path
