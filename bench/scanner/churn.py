"""The worst case for a scanner: pages that look quiet until they are merged."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench.programs.crew import running
from bench.results import Wrong
from bench.scanner import churner, watching
from bench.scanner.pairs import Programs, Run
from bench.scanner.recording import Recorder


class Options(msgspec.Struct, frozen=True):
    """What to have it do."""

    size_bytes: int = 256 << 20
    quiet_seconds: float = 6.0
    seconds: float = 60.0
    every_seconds: float = 0.2
    watch: watching.Options = watching.Options()


@contextlib.contextmanager
def started(options: Options, _: Run) -> Iterator[Programs]:
    """Have the program run, filled for the first time.

    Raises:
        Wrong: it does not, or read what it had not written.
    """
    command = [sys.executable, "-P", str(Path(churner.__file__))]
    command += [str(options.size_bytes), str(options.quiet_seconds)]
    with running(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise Wrong(f"the program ended with {process.wait()}")

        def work(recorder: Recorder) -> None:
            while (left := options.seconds - recorder.now) > 0:
                recorder.wait(min(1.0, left))
                check()

        def check() -> None:
            if process.poll() is not None:
                raise Wrong(f"the program ended with {process.returncode}")

        yield Programs([process.pid], work, check)
