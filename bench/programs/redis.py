"""Redis servers that hold the same: their allocator is jemalloc."""

from __future__ import annotations

import contextlib
import functools
import random
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.programs.crew import (
    PATIENCE_SECONDS,
    Client,
    Crew,
    expect,
    running,
    wait_for,
)
from bench.programs.debian import Packages, packages
from bench.results import Wrong

SERVERS = 2
_CLIENTS_EACH = 2
_KEYS = 16_000
_VALUE_BYTES = 4_000
_BENCHMARK_REQUESTS = 5_000


@contextlib.contextmanager
def redis() -> Iterator[Crew]:
    """Have servers with the same 64 MB each.

    Raises:
        Skipped: they cannot be had.
    """
    with (
        packages("redis-server") as found,
        tempfile.TemporaryDirectory(prefix="sksm-redis-") as folder,
        contextlib.ExitStack() as stack,
    ):
        paths = [Path(folder, f"{number}.sock") for number in range(SERVERS)]
        pids = [stack.enter_context(_server(found, path)) for path in paths]
        first = [stack.enter_context(Connection(path)) for path in paths]
        for connection in first:
            _fill(connection)
        clients = [
            _client(number, stack.enter_context(Connection(path)))
            for path in paths
            for number in range(_CLIENTS_EACH)
        ]
        crew = Crew(pids, clients, functools.partial(_inspect, first))
        crew.extra = functools.partial(_benchmark, found, paths)
        crew.notes.append(f"allocator: {_allocator(first[0])}")
        yield crew


@contextlib.contextmanager
def _server(found: Packages, path: Path) -> Iterator[int]:
    quiet = ["--port", "0", "--save", "", "--appendonly", "no", "--logfile", ""]
    quiet += ["--dir", str(path.parent), "--unixsocket", str(path)]
    with running(
        [found.file("usr/bin/redis-server"), *quiet],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=found.environment,
    ) as process:
        with wait_for(lambda: Connection(path), "Redis") as connection:
            expect(connection.ask("PING"), "PONG", "PING")
        yield process.pid


class Connection:
    """A connection that speaks Redis's protocol, RESP."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_SECONDS)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._answers = self._socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.close()
        self._socket.close()

    def ask(self, *words: str | int | bytes) -> str | int | bytes | None:
        """Send one command and give its answer.

        Raises:
            Wrong: an error, or the connection ended.
        """
        parts = [w if isinstance(w, bytes) else str(w).encode() for w in words]
        message = b"*%d\r\n" % len(parts)
        message += b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        self._socket.sendall(message)
        kind, rest = self._line()
        if kind == b"+":
            return rest.decode()
        if kind == b":":
            return int(rest)
        if kind != b"$":
            raise Wrong(f"Redis: {rest.decode()}")
        if (length := int(rest)) < 0:
            return None
        return self._answers.read(length + 2)[:-2]

    def _line(self) -> tuple[bytes, bytes]:
        line = self._answers.readline()
        if not line:
            raise Wrong("Redis ended the connection")
        return line[:1], line[1:-2]


def _value(key: int) -> bytes:
    return random.Random(key).randbytes(_VALUE_BYTES)


def _fill(connection: Connection) -> None:
    for key in range(_KEYS):
        expect(connection.ask("SET", f"fixed:{key}", _value(key)), "OK", "SET")


def _client(number: int, connection: Connection) -> Client:
    """Read what was there from the start, and write, count and take away more."""
    chance = random.Random(number)
    held: dict[str, bytes] = {}
    counted = 0

    def ask() -> None:
        nonlocal counted
        key = f"own:{number}:{chance.randrange(200)}"
        choice = chance.random()
        if choice < 0.5:
            fixed = chance.randrange(_KEYS)
            answer = connection.ask("GET", f"fixed:{fixed}")
            expect(answer, _value(fixed), f"fixed:{fixed}")
        elif choice < 0.7:
            held[key] = chance.randbytes(chance.randrange(1, 100_000))
            expect(connection.ask("SET", key, held[key]), "OK", key)
        elif choice < 0.85:
            expect(connection.ask("GET", key), held.get(key), key)
        elif choice < 0.9:
            there = held.pop(key, None) is not None
            expect(connection.ask("DEL", key), int(there), key)
        else:
            counted += 1
            expect(connection.ask("INCR", f"count:{number}"), counted, "INCR")

    return ask


def _benchmark(found: Packages, paths: list[Path]) -> None:
    """Run redis-benchmark once on each server."""
    for path in paths:
        command = [found.file("usr/bin/redis-benchmark"), "-s", path, "-q", "-c", "2"]
        command += ["-n", str(_BENCHMARK_REQUESTS), "-t", "set,get,incr,lpush,lpop"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=found.environment,
            timeout=PATIENCE_SECONDS,
        )
        if done.returncode or "rror" in done.stdout + done.stderr:
            raise Wrong(f"redis-benchmark: {(done.stdout + done.stderr)[-300:]}")


def _inspect(connections: list[Connection]) -> None:
    for connection in connections:
        for key in range(_KEYS):
            answer = connection.ask("GET", f"fixed:{key}")
            expect(answer, _value(key), f"fixed:{key}")


def _allocator(connection: Connection) -> str:
    answer = connection.ask("INFO", "memory")
    assert isinstance(answer, bytes)
    lines = answer.decode().splitlines()
    return next(line.split(":")[1] for line in lines if line.startswith("mem_alloc"))
