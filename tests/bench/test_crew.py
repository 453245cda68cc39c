"""What stands behind the crews: programs that end, and answers that are checked."""

import subprocess
import sys

import psutil
import pytest

from bench.programs.crew import Crew, expect, running
from bench.programs.load import Load
from bench.results import Wrong
from tests.conftest import ended, poll

_SLEEP = [sys.executable, "-c", "import time; time.sleep(100)"]
# Runs a program, says which, and waits to be killed.
_KEEPER = """
import time
from bench.programs.crew import running
with running(["sleep", "100"]) as process:
    print(process.pid, flush=True)
    time.sleep(100)
"""


def crew(*clients):
    return Crew([], list(clients), inspect=lambda: None)


def test_one_wrong_answer_among_right_ones_is_an_error_with_the_question():
    """No load passes by what a client did not get."""
    answers = iter([4] * 20 + [5])

    def client():
        expect(next(answers), 4, "2 + 2")

    error = pytest.raises(Wrong, match=r"2 \+ 2: 5, not 4")
    with Load(crew(client)) as load, error:
        load.go_on(60)


def test_a_phase_counts_the_answers_of_all_clients():
    """Also how long they took: each is at most the longest."""
    asked = []
    clients = crew(lambda: asked.append(1), lambda: asked.append(2))
    with Load(clients) as load, load.phase("some"):
        before = len(asked)
        poll(lambda: {1, 2} <= set(asked[before + 2 :]))
    phase = load.phases["some"]
    assert 1 <= phase.answers <= len(asked)
    assert phase.p99_seconds <= phase.max_seconds <= phase.seconds


def test_a_program_ends_with_the_block_and_not_before():
    """By its own number."""
    with running(_SLEEP) as process:
        assert process.poll() is None
    assert process.returncode is not None


def test_a_program_ends_when_its_keeper_is_killed():
    """Nothing is left behind, however the bench ends."""
    keeper = subprocess.Popen(
        [sys.executable, "-c", _KEEPER], stdout=subprocess.PIPE, text=True
    )
    with keeper:
        pid = int(keeper.stdout.readline())
        poll(lambda: psutil.Process(pid).name() == "sleep")
        keeper.kill()
    poll(lambda: ended(pid))


def test_a_crew_that_lost_a_process_is_not_alive():
    """The one that ended is named, and what ended it."""
    with running(_SLEEP) as process:
        one = Crew([process.pid], [], inspect=lambda: None)
        one.require_alive()
        process.kill()
        poll(lambda: ended(process.pid))
        with pytest.raises(Wrong, match=f"process {process.pid} has ended: SIGKILL"):
            one.require_alive()
