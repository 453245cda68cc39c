"""SIGKILL of a scanner, or of the store: programs go on, with their own bytes."""

import contextlib
import os
import random
import signal
import subprocess

import psutil
import pytest

from tests.commands.conftest import PROGRAM
from tests.conftest import daemon_pid, poll
from tests.process.holder import Holder
from tests.scanner.conftest import WATCHING
from tests.scanner.test_scanner import inside, merged

pytestmark = WATCHING
KINDS = [*range(1, 300), *[0] * 50, *range(1, 300)]
MOST_DESCRIPTORS = 3  # that a killed one may leave in a program, while it passes them


def watch(pids, *options):
    named = [word for pid in pids for word in ("--pid", str(pid))]
    command = [*PROGRAM, "watch", "--json", "--quiet-for", "1", "--cpu", "100"]
    return subprocess.Popen(
        [*command, *options, *named], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(3, marks=pytest.mark.limit(300)),
        pytest.param(150, marks=[pytest.mark.slow, pytest.mark.limit(1800)]),
    ],
)
def test_programs_outlive_their_scanner_whenever_it_is_killed(puppets, runtime, kills):
    """While it looks, reads, stops them, merges; and the store, every other time."""
    chance = random.Random(os.urandom(8))
    crew = [Holder(puppets, KINDS) for _ in range(3)]
    pids = [one.pid for one in crew]
    sums = [one.ask("sum") for one in crew]
    before = [descriptors(pid) for pid in pids]
    for turn in range(kills):
        for one in crew:  # what was merged becomes its own, and is merged again
            for index in chance.sample(range(299), 150):
                one.ask("put", index, index + 1)
        scanner = watch(pids)
        with scanner:
            assert scanner.stdout.readline()  # its first epoch
            with contextlib.suppress(subprocess.TimeoutExpired):
                scanner.wait(chance.uniform(0.0, 3.0))
            if turn % 2 and (store := daemon_pid(runtime)):
                os.kill(store, signal.SIGKILL)
            scanner.kill()
        assert [one.ask("sum") for one in crew] == sums
        assert all(
            psutil.Process(pid).status() != psutil.STATUS_TRACING_STOP for pid in pids
        )
    # What a killed store had merged is not merged with what the next one has.
    left = [descriptors(pid) - n for pid, n in zip(pids, before, strict=True)]
    assert max(left) <= MOST_DESCRIPTORS * kills
    with watch(pids) as scanner:
        assert scanner.stdout.readline()
        spans = [inside(one, 299) for one in crew]
        poll(
            lambda: all(
                merged(pid, span) > 100 for pid, span in zip(pids, spans, strict=True)
            ),
            seconds=100,  # pages that are few wait a minute for others
        )
        scanner.terminate()
        assert scanner.wait(20) == 0
    assert [one.ask("sum") for one in crew] == sums
