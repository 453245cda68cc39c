"""Programs that check themselves (targets/*.c): started, watched, ended."""

import contextlib
import mmap
import os
import pathlib
import subprocess

import numpy as np

from sksm.spans import Span
from tests.conftest import poll

SOURCES = pathlib.Path(__file__).with_name("targets")
NO_SUCH_THING = 77  # an exit status: this machine lacks what the program tests

# struct board of targets/target.h.
BOARD = np.dtype(
    [
        ("ready", "<u8"),
        ("region", "<u8", (16, 2)),
        ("counter", [("turns", "<u8"), ("interrupted", "<u8"), ("name", "S24")], 64),
    ]
)


def build(folder):
    """Compile every program; gives their paths by name."""
    built = {}
    for source in sorted(SOURCES.glob("*.c")):
        built[source.stem] = folder / source.stem
        options = ["-O2", "-pthread", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(
            ["cc", *options, "-o", built[source.stem], source], check=True, timeout=100
        )
    return built


def threads_of(pid):
    """List the threads of a process; none if it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]
    return []


class Target:
    """A program that runs, and ends with 0 when told unless a byte was wrong."""

    def __init__(self, path, *args):
        fd = os.memfd_create("board")
        os.ftruncate(fd, BOARD.itemsize)
        self.board = np.frombuffer(mmap.mmap(fd, BOARD.itemsize), BOARD)[0]
        self._said = os.memfd_create("said")
        self.process = subprocess.Popen(
            [path, str(fd), *map(str, args)],
            stdin=subprocess.PIPE,
            stderr=self._said,
            pass_fds=[fd],
        )
        os.close(fd)
        self.pid = self.process.pid
        poll(lambda: self.board["ready"] or self.process.poll() is not None)

    def __repr__(self):
        return f"{pathlib.Path(self.process.args[0]).name} ({self.said() or 'silent'})"

    def said(self):
        """Give what it had to say of itself, which is nothing while all is well."""
        with open(f"/proc/self/fd/{self._said}", errors="replace") as text:
            return text.read()

    def spans(self):
        """List what it offers just now."""
        pairs = self.board["region"].tolist()
        return [Span(start, stop) for start, stop in pairs if 0 < start < stop]

    def turns(self):
        """Say how often each thing was done so far."""
        return self.board["counter"]["turns"].copy()

    def named(self, what="turns"):
        """Give a number of each counter by its name."""
        counters = self.board["counter"][self.board["counter"]["name"] != b""]
        return {one["name"].decode(): int(one[what]) for one in counters}

    def goes_on(self, seconds=30.0):
        """Wait until everything it does was done once more."""
        before = self.turns()
        used = self.board["counter"]["name"] != b""

        def done():
            assert self.process.poll() is None, self
            return (self.turns()[used] > before[used]).all()

        try:
            poll(done, seconds)
        except AssertionError as error:
            stuck = self.board["counter"]["name"][used & (self.turns() <= before)]
            raise AssertionError(
                f"{self}: no more of {stuck}: {self.states()}"
            ) from error

    def states(self):
        """Give the state letter, and the tracer, of each thread."""
        found = {}
        for tid in threads_of(self.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                path = pathlib.Path(f"/proc/{self.pid}/task/{tid}/status")
                lines = path.read_text().splitlines()
                words = dict(line.split(":", 1) for line in lines)
                found[tid] = (words["State"].split()[0], int(words["TracerPid"]))
        return found

    def let_go(self):
        """Say whether no thread is stopped or traced."""
        return all(s not in "tT" and not by for s, by in self.states().values())

    def descriptors(self):
        """Say how many descriptors it has."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def links(self):
        """Name what its descriptors refer to."""
        found = []
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/{self.pid}/fd/{fd}"))
        return found

    def maps(self):
        """List its mappings: span, and the name of the file."""
        found = []
        with open(f"/proc/{self.pid}/maps") as lines:
            for line in lines:
                where, _, _, _, _, *name = line.split()
                start, stop = (int(word, 16) for word in where.split("-"))
                found.append((Span(start, stop), " ".join(name)))
        return found

    def end(self, seconds=60.0):
        """Tell it to end and give its exit status."""
        with contextlib.suppress(BrokenPipeError):  # a byte: others may hold the pipe
            self.process.stdin.write(b".")
            self.process.stdin.close()
        return self.process.wait(seconds)

    def ends_well(self):
        """Tell it to end, which it does with status 0: every byte was right."""
        status = self.end()
        assert status == 0, f"{self}: status {status}"

    def kill(self):
        """Be done with it."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        os.close(self._said)
