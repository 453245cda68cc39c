"""Node servers that hold the same: their heap is V8's."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.programs.crew import PATIENCE_SECONDS, Client, Crew, expect, running
from bench.programs.debian import Packages, packages
from bench.results import Wrong

SERVERS = 3
_PROGRAM = Path(__file__).with_name("node_server.js")
_USERS = 200_000  # as node_server.js has them
_WORDS = 8 << 20


@contextlib.contextmanager
def node() -> Iterator[Crew]:
    """Have servers with the same objects and bytes.

    Raises:
        Skipped: they cannot be had.
    """
    with packages("nodejs") as found, contextlib.ExitStack() as stack:
        started = [stack.enter_context(_server(found)) for _ in range(SERVERS)]
        servers = [_port(process) for process in started]
        visits: list[dict[int, int]] = [{} for _ in servers]
        clients = [
            _client(number, port, visits[number]) for number, port in enumerate(servers)
        ]
        pids = [process.pid for process in started]
        yield Crew(pids, clients, functools.partial(_inspect, servers, visits))


def _server(
    found: Packages,
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    return running(
        [found.file("usr/bin/node"), _PROGRAM],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=found.environment,
    )


def _port(process: subprocess.Popen[str]) -> int:
    """Read on which port a server listens, once it does."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise Wrong(f"node ended with {process.wait()}")
    return int(line)


def _client(number: int, port: int, visits: dict[int, int]) -> Client:
    """Ask for objects, which count their visits, for bytes, and for work."""
    chance = random.Random(number)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)

    def ask() -> None:
        choice = chance.random()
        if choice < 0.5:
            _check_user(connection, chance.randrange(_USERS), visits)
        elif choice < 0.9:
            word = chance.randrange(_WORDS)
            expect(_ask(connection, "word", word), _word(word), f"word {word}")
        else:
            seed = chance.randrange(1, 5003)
            middle = sorted(n * seed % 5003 for n in range(5000))[2500]
            expect(_ask(connection, "sort", seed), middle, f"sort {seed}")

    return ask


def _check_user(
    connection: http.client.HTTPConnection, number: int, visits: dict[int, int]
) -> None:
    visits[number] = visits.get(number, 0) + 1
    name = f"user {number * 7919 % 1_000_003}"
    wanted = {"id": number, "name": name, "visits": visits[number]}
    expect(_ask(connection, "user", number), wanted, f"user {number}")


def _word(number: int) -> int:
    return number * 4 * 2654435761 % 2**32


def _ask(connection: http.client.HTTPConnection, name: str, argument: int) -> Any:
    connection.request("GET", f"/{name}/{argument}")
    answer = connection.getresponse()
    return json.loads(answer.read())


def _inspect(ports: list[int], visits: list[dict[int, int]]) -> None:
    for port, seen in zip(ports, visits, strict=True):
        connection = http.client.HTTPConnection(
            "127.0.0.1", port, timeout=PATIENCE_SECONDS
        )
        with contextlib.closing(connection):
            for number in range(0, _USERS, 20):
                _check_user(connection, number, seen)
            for number in range(0, _WORDS, 4099):
                word = _ask(connection, "word", number)
                expect(word, _word(number), f"word {number}")
