"""PostgreSQL with sessions that stay connected, as an application's pool has them.

A session keeps what it learned of the tables it used, which grows with their
number: the same in each session of one application.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import hashlib
import os
import pwd
import random
import select
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

from bench.programs.crew import (
    PATIENCE_SECONDS,
    Client,
    Crew,
    expect,
    ordinary_user,
    running,
    wait_for,
)
from bench.programs.debian import Packages, packages
from bench.results import Wrong

SESSIONS = 8
_TABLES = 400  # partitions of one table, each with an index
_ROWS_EACH = 50
_ACCOUNTS = 100  # of each session
_WORK_MEMORY = "16MB"
# A session's end of answer. No answer is like it.
_END = "-- over --"

_SETTINGS = {
    "listen_addresses": "''",
    "shared_buffers": "64MB",
    "fsync": "off",
    "max_connections": "20",
    "work_mem": _WORK_MEMORY,
    "temp_buffers": "16MB",
    "jit": "off",
}


@contextlib.contextmanager
def postgres() -> Iterator[Crew]:
    """Have a server of our own with sessions that have used every table.

    Raises:
        Skipped: it cannot be had.
    """
    with (
        packages("postgresql", "postgresql-client") as found,
        tempfile.TemporaryDirectory(prefix="sksm-pg-") as folder,
        contextlib.ExitStack() as stack,
    ):
        server = Server(found, Path(folder))
        parent = stack.enter_context(server.running())
        first = stack.enter_context(server.session())
        _fill(first)
        sessions = [stack.enter_context(server.session()) for _ in range(SESSIONS)]
        for session in sessions:
            _use_everything(session)
        clients = [_client(n, session) for n, session in enumerate(sessions)]
        pids = [int(session.ask("SELECT pg_backend_pid()")[0]) for session in sessions]
        inspect = functools.partial(_inspect, first)
        kin = [child for child in _children(parent.pid) if child not in pids]
        yield Crew(pids, clients, inspect, [parent.pid, *kin])


class Server:
    """A cluster in a directory of its own, by way of a socket there."""

    def __init__(self, found: Packages, folder: Path) -> None:
        self._found = found
        self._folder = folder
        self._data = folder / "data"

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen]:
        """Make the cluster and run it, as an ordinary user: it refuses root."""
        user = ordinary_user()
        if user:
            os.chown(self._folder, *_ids(user))
        bare = ["--auth=trust", "--username=sksm", "--no-sync", "--locale=C"]
        made = subprocess.run(
            [self._program("initdb"), *bare, "--encoding=UTF8", self._data],
            capture_output=True,
            text=True,
            env=self._found.environment,
            cwd=self._folder,
            **user,
        )
        if made.returncode:
            raise Wrong(f"initdb: {made.stderr.strip()[-500:]}")
        options = [
            f"-c{name}={value}".replace("''", "") for name, value in _SETTINGS.items()
        ]
        with (
            (self._folder / "log").open("wb") as log,
            running(
                [
                    self._program("postgres"),
                    "-D",
                    self._data,
                    "-k",
                    self._folder,
                    *options,
                ],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=self._found.environment,
                cwd=self._folder,
                **user,
            ) as process,
        ):
            wait_for(self._answers, "PostgreSQL")
            yield process

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """Open a session that stays."""
        with subprocess.Popen(
            [*self._psql(), "--set=ON_ERROR_STOP=1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._found.environment,
            process_group=0,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                yield Session(process.stdin, process.stdout)
            finally:
                process.kill()

    def _answers(self) -> bool:
        command = [*self._psql(), "--command=SELECT 1"]
        done = subprocess.run(command, capture_output=True, env=self._found.environment)
        return done.stdout == b"1\n"

    def _psql(self) -> list[str | Path]:
        name = ["--username=sksm", "--dbname=postgres", f"--host={self._folder}"]
        return [self._program("psql"), *name, "-X", "-q", "-A", "-t"]

    def _program(self, name: str) -> Path:
        return self._found.file(f"usr/lib/postgresql/*/bin/{name}")


class Session:
    """One connection, through psql."""

    def __init__(self, questions: IO[bytes], answers: IO[bytes]) -> None:
        self._questions = questions
        self._answers = answers
        self._held = b""

    def ask(self, sql: str) -> list[str]:
        """Run statements; gives the lines that they answer.

        Raises:
            Wrong: an error, or no answer.
        """
        self._questions.write(f"{sql};\n\\echo {_END}\n".encode())
        self._questions.flush()
        end = f"{_END}\n".encode()
        while not self._held.endswith(end):
            if not select.select([self._answers], [], [], PATIENCE_SECONDS)[0]:
                raise Wrong(f"{sql:.100}: no answer")
            if not (part := os.read(self._answers.fileno(), 1 << 16)):
                raise Wrong(f"{sql:.100}: {self._held.decode()}")
            self._held += part
        lines = self._held.decode().splitlines()[:-1]
        self._held = b""
        return lines


def _fill(session: Session) -> None:
    accounts, rows = SESSIONS * _ACCOUNTS, _TABLES * _ROWS_EACH
    session.ask(
        f"""
        CREATE TABLE event (id int, kind int, note text) PARTITION BY RANGE (id);
        DO $$ BEGIN FOR n IN 0..{_TABLES - 1} LOOP
          EXECUTE format(
            'CREATE TABLE event_%s PARTITION OF event FOR VALUES FROM (%s) TO (%s)',
            n, n * {_ROWS_EACH}, (n + 1) * {_ROWS_EACH});
        END LOOP; END $$;
        CREATE INDEX ON event (id);
        INSERT INTO event
          SELECT i, i % 7, md5(i::text) FROM generate_series(0, {rows - 1}) i;
        CREATE TABLE account (id int PRIMARY KEY, balance bigint);
        INSERT INTO account
          SELECT i, 1000 FROM generate_series(0, {accounts - 1}) i;
        ANALYZE
        """
    )


def _use_everything(session: Session) -> None:
    """Have a session know every table, keep plans, and hold rows of its own."""
    session.ask(
        """
        SET plan_cache_mode = force_generic_plan;
        PREPARE total (int) AS SELECT count(*), sum(id) FROM event WHERE kind = $1;
        PREPARE note (int) AS SELECT note FROM event WHERE id = $1;
        PREPARE pay (int, bigint) AS
          UPDATE account SET balance = balance + $2 WHERE id = $1 RETURNING balance;
        CREATE TEMPORARY TABLE own AS
          SELECT i, md5(i::text) AS m FROM generate_series(0, 49999) i
        """
    )
    _check_total(session, 0)
    _check_note(session, 0)


def _client(number: int, session: Session) -> Client:
    """Ask for a row, a sum over all tables or the session's own, or pay and look."""
    chance = random.Random(number)
    balances = dict.fromkeys(range(number * _ACCOUNTS, (number + 1) * _ACCOUNTS), 1000)

    def pay() -> None:
        account = chance.choice(list(balances))
        amount = chance.randrange(-50, 50)
        balances[account] += amount
        answer = session.ask(f"EXECUTE pay({account}, {amount})")
        expect(answer, [str(balances[account])], f"balance of {account}")

    def ask() -> None:
        choice = chance.random()
        if choice < 0.02:
            _check_total(session, chance.randrange(7))
        elif choice < 0.05:
            answer = session.ask("SELECT count(*), sum(i) FROM own")
            expect(answer, [f"50000|{49999 * 50000 // 2}"], "rows of its own")
        elif choice < 0.4:
            pay()
        else:
            _check_note(session, chance.randrange(_TABLES * _ROWS_EACH))

    return ask


def _check_total(session: Session, kind: int) -> None:
    ids = range(kind, _TABLES * _ROWS_EACH, 7)
    answer = session.ask(f"EXECUTE total({kind})")
    expect(answer, [f"{len(ids)}|{sum(ids)}"], f"total of kind {kind}")


def _check_note(session: Session, number: int) -> None:
    wanted = hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()
    expect(session.ask(f"EXECUTE note({number})"), [wanted], f"note {number}")


def _inspect(session: Session) -> None:
    rows = _TABLES * _ROWS_EACH
    answer = session.ask(
        "SELECT count(*), sum(id), bool_and(note = md5(id::text)) FROM event"
    )
    expect(answer, [f"{rows}|{rows * (rows - 1) // 2}|t"], "all rows")


def _children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


def _ids(user: dict[str, str]) -> tuple[int, int]:
    return pwd.getpwnam(user["user"]).pw_uid, grp.getgrnam(user["group"]).gr_gid
