"""The process that ends what a test left running; started by tests/watchdog.py.

It is a program of its own, and imports little: it must work where the process that
runs the tests is stuck in the kernel, and outlive it. What it may end is known by a
mark that every process started by the tests has inherited:

- a variable of the environment, whose name no other run has (/proc/PID/environ shows
  what a program was started with, proc_pid_environ(5));
- for those that were forked and started no program, and so show the environment of
  their parent's start: a mapping of a memfd of that name (/proc/PID/maps);
- or they descend from the process that runs the tests.

A new session or a new parent changes none of the first two.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

PREFIX = "SKSM_TEST_MARK_"
# After the worker's death its children may be in the middle of a fork: look again.
_ROUNDS = 200
_PAUSE_S = 0.01


def parents():
    """Map the pid of each process to that of its parent."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{name}/stat").read_bytes()
                # The name, in parentheses, may hold any byte.
                fields = stat.rpartition(b")")[2].split()
                if fields[0] not in (b"Z", b"X"):
                    found[int(name)] = int(fields[1])
    return found


def descends(pid, ancestor, parent_of):
    """Say whether `ancestor` is `pid` or one of its ancestors."""
    seen = set()
    while pid and pid != ancestor and pid not in seen:
        seen.add(pid)
        pid = parent_of.get(pid)
    return pid == ancestor


def is_marked(pid, mark):
    """Say whether a process has inherited `mark`; no if it may not be looked at."""
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if any(one.startswith(mark + b"=") for one in variables):
            return True
    with contextlib.suppress(OSError):
        return b"/memfd:" + mark in Path(f"/proc/{pid}/maps").read_bytes()
    return False


def end_all(mark, worker=None):
    """End the worker and all that it started, until none is left; gives their number.

    Args:
        mark: what they have inherited.
        worker: pid and pidfd of the process that runs the tests, if it still runs.
    """
    ended, own = set(), os.getpid()
    for _ in range(_ROUNDS):
        parent_of, found = parents(), False
        for pid in parent_of:
            if pid in (own, 1):
                continue
            try:
                fd = os.pidfd_open(pid)
            except OSError:  # it ended, and its number is free
                continue
            try:
                # With the pidfd open the number can no longer become another's
                # between the look and the signal.
                below = worker is not None and descends(pid, worker[0], parent_of)
                if (below and still_below(pid, parent_of)) or is_marked(pid, mark):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    ended.add(pid)
                    found = True
            except OSError:
                pass
            finally:
                os.close(fd)
        if worker is not None and is_over(worker[1]):
            worker = None
        if not found:
            break
        time.sleep(_PAUSE_S)
    return len(ended)


def still_below(pid, parent_of):
    """Say whether a process has the parent that it had when all were listed."""
    return parents_of_one(pid) == parent_of[pid]


def parents_of_one(pid):
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return int(stat.rpartition(b")")[2].split()[1])


def is_over(pidfd):
    return bool(select.select([pidfd], [], [], 0)[0])


def whereabouts(pid):
    """Say in which system call and kernel function each thread of a process waits."""
    lines = []
    with contextlib.suppress(OSError):
        for tid in sorted(map(int, os.listdir(f"/proc/{pid}/task"))):
            words = []
            for name in ("comm", "syscall", "wchan"):
                with contextlib.suppress(OSError):
                    text = Path(f"/proc/{pid}/task/{tid}/{name}").read_text()
                    words.append(f"{name} {text.strip().split(' ')[0]}")
            lines.append(f"thread {tid}: {', '.join(words)}")
    return lines


class Watch:
    """The end of a test that is due, and what to do when it has passed."""

    def __init__(self, worker, channel, mark, folder):
        self.worker, self.channel, self.mark = worker, channel, mark
        self.folder, self.test, self.limit, self.due = folder, None, 0.0, None
        self.unread = b""

    def run(self):
        waiting = select.poll()
        waiting.register(self.worker[1], select.POLLIN)
        waiting.register(self.channel, select.POLLIN)
        while not is_over(self.worker[1]):
            if self.due is not None and time.monotonic() >= self.due:
                self.end_test()
                return
            left = None
            if self.due is not None:
                left = max(0.0, self.due - time.monotonic()) * 1000 + 1
            ready = dict(waiting.poll(left))
            # Should a test close the worker's end, the limit holds still.
            if self.channel in ready and not self.listen():
                waiting.unregister(self.channel)
        end_all(self.mark)

    def listen(self):
        data = os.read(self.channel, 1 << 16)
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            limit, test = json.loads(line)
            self.test, self.limit = test, limit
            self.due = None if test is None else time.monotonic() + limit
        return bool(data)

    def end_test(self):
        where = whereabouts(self.worker[0])
        number = end_all(self.mark, self.worker)
        stacks = ""
        with contextlib.suppress(OSError):
            stacks = (self.folder / f"{self.mark.decode()}.stacks").read_text()
        told = {
            "test": self.test,
            "limit": self.limit,
            "ended": number,
            "stacks": stacks.splitlines(),
            "kernel": where,
        }
        with open(self.folder / "killed", "a") as report:
            report.write(json.dumps(told) + "\n")
        print("\n".join(describe(told)), file=sys.stderr, flush=True)


def describe(told):
    """Tell of a test that was ended, in lines for a reader."""
    yield (
        f"WATCHDOG {told['test']}: not done after {told['limit']:g} s, "
        f"{told['ended']} processes ended"
    )
    yield from (f"    {line}" for line in told["stacks"])
    yield from (f"    {line}" for line in told["kernel"])


def main():
    """Leave the parent, and watch it: `reaper.py CHANNEL MARK FOLDER RUN`."""
    channel, run = int(sys.argv[1]), int(sys.argv[4])
    mark, folder = sys.argv[2].encode(), Path(sys.argv[3])
    pid = os.getppid()
    worker = pid, os.pidfd_open(pid)
    # Held as long as this process lives: the run's end waits for it.
    life = open(folder / f"{mark.decode()}.life", "w")  # noqa: SIM115
    fcntl.flock(life, fcntl.LOCK_EX)
    if os.fork():  # not a child of the tests, which count theirs
        os._exit(0)
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    Watch(worker, channel, mark, folder).run()
    if run not in parents():  # it was killed, and removes nothing
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
