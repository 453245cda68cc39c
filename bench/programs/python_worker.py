"""A Python worker as many run: pandas, a web server, 150 MiB of objects.

    python_worker.py DESCRIPTOR... [--working]

Serves on listening sockets that it inherits. With more than one it loads
everything and forks a worker for each, as gunicorn does with --preload. A worker
collects garbage and looks at every object once; then it waits for requests, and
with --working goes on looking at its objects.

What it answers can be computed from the functions here, so a client knows.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import signal
import sys
import threading
import time
from typing import Any

USERS = 225_000
ROWS = 1_000_000
_SLICE = 2_000  # users looked at in one go
_ROUND_SECONDS = 2.0  # in which a working worker looks at all of its objects
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def user(number: int) -> dict[str, Any]:
    """Make up one object: the same whoever asks."""
    return {
        "id": number,
        "name": f"user {number * 7919 % 1_000_003}",
        "tags": [f"tag {number * step % 9973}" for step in range(1, 1 + number % 5)],
    }


def columns() -> dict[str, Any]:
    """Make up a table of numbers: the same whoever asks."""
    import numpy as np  # noqa: PLC0415

    generator = np.random.default_rng(11)
    return {
        "key": generator.integers(0, 64, ROWS),
        "value": generator.integers(0, 1_000, ROWS),
    }


def digest(users: list[dict[str, Any]], table: dict[str, Any]) -> str:
    """Sum up everything in a few letters."""
    sum_ = hashlib.blake2b(digest_size=16)
    for one in users:
        sum_.update(repr(one).encode())
    for column in table.values():
        sum_.update(column.tobytes())
    return sum_.hexdigest()


class Held:
    """What a worker keeps in memory."""

    def __init__(self) -> None:
        import pandas as pd  # noqa: PLC0415

        self.users = [user(number) for number in range(USERS)]
        self.frame = pd.DataFrame(columns())

    def look(self, first: int = 0, stop: int = USERS) -> int:
        """Look at objects, which writes to each: Python counts references."""
        return sum(
            len(one["name"]) + sum(map(len, one["tags"]))
            for one in self.users[first:stop]
        )


def application(held: Held) -> Any:
    """Build the web application."""
    import flask  # noqa: PLC0415

    app = flask.Flask("worker")
    app.config["HELD"] = held

    @app.get("/pid")
    def pid() -> Any:
        return flask.jsonify(os.getpid())

    @app.get("/user/<int:number>")
    def one(number: int) -> Any:
        return flask.jsonify(held.users[number])

    @app.get("/total/<int:key>")
    def total(key: int) -> Any:
        rows = held.frame["value"][held.frame["key"] == key]
        return flask.jsonify(int(rows.sum()))

    @app.get("/digest")
    def everything() -> Any:
        table = {name: held.frame[name].to_numpy() for name in held.frame}
        return flask.jsonify(digest(held.users, table))

    return app


def loaded() -> Any:
    """Load everything and build the application, for a server that forks itself."""
    return application(Held())


def serve(held: Held, descriptor: int, *, working: bool) -> None:
    """Be a worker, for ever."""
    from werkzeug.serving import WSGIRequestHandler, make_server  # noqa: PLC0415

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            """Say nothing."""

    # For a socket at hand, host and port are not looked at.
    server = make_server(
        "127.0.0.1", 0, application(held), request_handler=Quiet, fd=descriptor
    )
    gc.collect()
    held.look()
    if working:
        threading.Thread(target=_go_on_looking, args=(held,), daemon=True).start()
    server.serve_forever(poll_interval=60.0)  # idle is idle


def _go_on_looking(held: Held) -> None:
    pause = _ROUND_SECONDS * _SLICE / USERS
    while True:
        for first in range(0, USERS, _SLICE):
            held.look(first, first + _SLICE)
            time.sleep(pause)


def main() -> None:
    """Load, fork where there is more than one socket, serve."""
    working = "--working" in sys.argv
    sockets = [int(word) for word in sys.argv[1:] if word != "--working"]
    # Imported before anybody forks, as what a worker needs mostly is.
    import flask  # noqa: F401, PLC0415
    import werkzeug.serving  # noqa: F401, PLC0415

    held = Held()
    if len(sockets) == 1:
        serve(held, sockets[0], working=working)
    for descriptor in sockets:
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            serve(held, descriptor, working=working)
    signal.pause()


if __name__ == "__main__":
    main()
