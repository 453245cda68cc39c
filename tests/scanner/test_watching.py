"""All that the command starts counts as its cost, and ends with it."""

import shlex
import sys

import psutil

from bench.results import Wrong
from bench.scanner.watching import Options, watching
from tests.conftest import ended, poll

# Starts a program that is nobody's child and works a while, and then waits.
_STARTS = """
import json, subprocess, sys, time
one = [sys.executable, "-c", sys.argv[1]]
print(json.dumps({"told": sys.argv[2:]}), flush=True)
subprocess.run(["sh", "-c", '"$@" & echo $!', "sh", *one], stdout=sys.stderr)
time.sleep(100)
"""
_WORKS = "import time\nwhile time.process_time() < 0.6: pass\n"


def command(works):
    return shlex.join([sys.executable, "-c", _STARTS, works])


def children():
    return psutil.Process().children(recursive=True)


def test_processor_time_of_an_orphan_counts_after_its_end_too():
    """As with sksmd, which is nobody's child."""
    with watching(Options(command(_WORKS)), "--qemu") as watch:
        poll(lambda: watch.cost().cpu_seconds >= 0.4)
        poll(lambda: watch.cost() and len(children()) == 1)
        assert watch.cost().cpu_seconds >= 0.4
    assert watch.epochs == [{"told": ["--qemu", "--json"]}]


def test_what_the_command_left_behind_ends_with_the_block():
    """By its own number, and nobody else."""
    with watching(Options(command(f"{_WORKS}time.sleep(100)"))) as watch:
        poll(lambda: watch.cost().cpu_seconds >= 0.4)
        started = [one.pid for one in children()]
        assert len(started) == 2
    for pid in started:
        poll(lambda pid=pid: ended(pid))


def test_a_command_that_ends_is_an_error_with_what_it_said():
    """Nothing is measured of a scanner that is not there."""
    told = shlex.join([sys.executable, "-c", "import sys; sys.exit('no such option')"])
    with watching(Options(told)) as watch:

        def has_ended():
            try:
                watch.require_alive()
            except Wrong as error:
                return str(error)

        assert "no such option" in poll(has_ended)
