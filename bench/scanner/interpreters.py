"""Workers of a web server, forked from one process, that answer requests."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psutil

from bench.programs import python_crews
from bench.programs.crew import Crew, expect, running
from bench.programs.load import Load
from bench.results import Skipped, Wrong
from bench.scanner import gunicorn_settings, watching
from bench.scanner.pairs import Programs, Run
from bench.scanner.recording import Recorder

_NEEDED = ("gunicorn", "flask", "pandas")
_APPLICATION = "python_worker:loaded()"
_FOLDER = Path(python_crews.__file__).parent
_SETTINGS = Path(gunicorn_settings.__file__)
_LOAD = "load"


class Options(msgspec.Struct, frozen=True):
    """What to have them do."""

    workers: int = 8
    clients: int = 4
    seconds: float = 300.0
    every_seconds: float = 5.0  # the kernel's look at so many mappings slows them down
    watch: watching.Options = watching.Options()


@contextlib.contextmanager
def started(options: Options, run: Run) -> Iterator[Programs]:
    """Have gunicorn with workers that are ready.

    Raises:
        Skipped: something is not installed.
        Wrong: it did not start.
    """
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise Skipped(f"{name} is not installed; make bench-scanner does it")
    with (
        socket.create_server(("127.0.0.1", 0), backlog=128) as door,
        running(
            _command(door.fileno(), options.workers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            pass_fds=[door.fileno()],
            env=python_crews.environment(),
        ) as master,
    ):
        _wait_for_workers(master, options.workers)
        workers = [child.pid for child in psutil.Process(master.pid).children()]
        port = door.getsockname()[1]
        crew = Crew(
            pids=[master.pid, *workers],
            clients=[python_crews.client(port, n) for n in range(options.clients)],
            inspect=functools.partial(_inspect, port, options.workers),
        )
        work = functools.partial(_work, crew, options.seconds, run)
        yield Programs(crew.pids, work, functools.partial(_check, crew))


def _command(descriptor: int, workers: int) -> list[str]:
    command = [sys.executable, "-P", "-m", "gunicorn", "--config", str(_SETTINGS)]
    command += ["--workers", str(workers), "--bind", f"fd://{descriptor}"]
    return [*command, "--pythonpath", str(_FOLDER), _APPLICATION]


def _wait_for_workers(master: subprocess.Popen[str], count: int) -> None:
    assert master.stdout is not None
    for _ in range(count):
        if not master.stdout.readline():
            raise Wrong(f"gunicorn ended with {master.wait()}")


def _work(crew: Crew, seconds: float, run: Run, recorder: Recorder) -> None:
    """Ask for a while, and note how the answers came."""
    with Load(crew) as load:
        with load.phase(_LOAD):
            while (left := seconds - recorder.now) > 0:
                load.go_on(min(1.0, left))
                recorder.wait(0.0)
        run.phase = load.phases[_LOAD]


def _check(crew: Crew) -> None:
    crew.require_alive()
    crew.inspect()


def _inspect(port: int, workers: int) -> None:
    """Ask for everything, all workers at once: one that works takes no other."""
    with ThreadPoolExecutor(workers) as pool:
        answers = pool.map(lambda _: python_crews.get(port, "/digest"), range(workers))
        for answer in answers:
            expect(answer, python_crews.digest(), "digest of all objects")
