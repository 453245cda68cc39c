"""Python workers, forked from one process or started one by one."""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.programs import python_worker
from bench.programs.crew import (
    PATIENCE_SECONDS,
    Client,
    Crew,
    expect,
    running,
    wait_for,
)
from bench.results import Skipped

WORKERS = 8
_PROGRAM = Path(python_worker.__file__)
_NEEDED = ("pandas", "flask")


@contextlib.contextmanager
def forked() -> Iterator[Crew]:
    """Have workers that are forked from one, and idle."""
    with _forked(working=False) as crew:
        yield crew


@contextlib.contextmanager
def working() -> Iterator[Crew]:
    """Have workers that are forked from one, and never stop looking at objects."""
    with _forked(working=True) as crew:
        yield crew


@contextlib.contextmanager
def separate() -> Iterator[Crew]:
    """Have workers that were started one by one, at the same addresses.

    Raises:
        Skipped: address randomisation cannot be switched off.
    """
    _require_packages()
    if subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode:
        raise Skipped("setarch -R may not switch off address randomisation here")
    # Each has its socket as stdin: not even by its arguments it differs.
    command = ["setarch", "-R", *_command("0")]
    with contextlib.ExitStack() as stack:
        doors = _doors(stack)
        for door in doors:
            start = running(command, stdin=door, env=environment())
            stack.enter_context(start)
        yield _crew(doors, working=False)


@contextlib.contextmanager
def _forked(*, working: bool) -> Iterator[Crew]:
    _require_packages()
    with contextlib.ExitStack() as stack:
        doors = _doors(stack)
        sockets = [door.fileno() for door in doors]
        command = _command(*map(str, sockets), *(["--working"] if working else []))
        start = running(command, pass_fds=sockets, env=environment())
        parent = stack.enter_context(start)
        crew = _crew(doors, working=working)
        crew.kin = [parent.pid]
        yield crew


def _require_packages() -> None:
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise Skipped(f"{name} is not installed; make bench-programs does it")


def _command(*options: str) -> list[str]:
    # From a file and not as a module: what a worker imports is its own business.
    return [sys.executable, "-P", str(_PROGRAM), *options]


def _doors(stack: contextlib.ExitStack) -> list[socket.socket]:
    """Open a listening socket for each worker: who asks too early just waits."""
    return [
        stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for _ in range(WORKERS)
    ]


def environment() -> dict[str, str]:
    """Give the environment in which workers run."""
    return {**os.environ, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}


def _crew(doors: list[socket.socket], *, working: bool) -> Crew:
    ports = [door.getsockname()[1] for door in doors]
    pids = [wait_for(lambda port=port: get(port, "/pid"), "worker") for port in ports]
    return Crew(
        pids=pids,
        clients=[client(port) for port in ports],
        inspect=functools.partial(_inspect, ports),
        busy=working,
    )


def get(port: int, path: str) -> Any:
    """Get what a worker says.

    Raises:
        Wrong: it says that something went wrong.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        expect(answer.status, 200, path)
        return json.loads(answer.read())


def client(port: int, seed: int | None = None) -> Client:
    """Ask for single objects, and now and then for a sum over the table."""
    chance = random.Random(port if seed is None else seed)

    def ask() -> None:
        if chance.random() < 0.1:
            key = chance.randrange(64)
            expect(get(port, f"/total/{key}"), _totals()[key], f"total of {key}")
        else:
            number = chance.randrange(python_worker.USERS)
            wanted = python_worker.user(number)
            expect(get(port, f"/user/{number}"), wanted, f"user {number}")

    return ask


@functools.cache
def _totals() -> list[int]:
    table = python_worker.columns()
    return np.bincount(table["key"], table["value"]).astype(int).tolist()


@functools.cache
def digest() -> str:
    """Give what a worker must answer when it is asked for everything."""
    users = [python_worker.user(number) for number in range(python_worker.USERS)]
    return python_worker.digest(users, python_worker.columns())


def _inspect(ports: list[int]) -> None:
    for port in ports:
        expect(get(port, "/digest"), digest(), "digest of all objects")
