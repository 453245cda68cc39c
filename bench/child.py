"""Where a row is measured: `python -m bench.child ROW`, options on stdin.

A process of its own, so that no row finds memory as another one left it.
"""

from __future__ import annotations

import ctypes
import importlib
import signal
import sys
from typing import NoReturn

import msgspec

from bench.results import Options, Row, Skipped, Wrong

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Measure one row and print it, in JSON."""
    signal.signal(signal.SIGTERM, _unwind)  # so that every scope undoes itself
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    options = msgspec.json.decode(sys.stdin.buffer.read(), type=Options)
    module = importlib.import_module(f"bench.rows.{sys.argv[1]}")
    try:
        row: Row = module.measure(options)
    except Skipped as reason:
        row = Row(skipped=str(reason))
    except Wrong as error:
        row = Row(failed=str(error))
    print(msgspec.json.encode(row).decode(), flush=True)


def _unwind(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # once is enough
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
