"""A control group that can be frozen: cgroup v1's freezer, or cgroup v2."""

import os
from pathlib import Path

import pytest

from tests.conftest import poll


def _mount_point(kind, option=None):
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, found, options, *_ = line.split()
        if found == kind and (option is None or option in options.split(",")):
            return Path(where)
    return None


class Freezer:
    """A group of processes that stop where they are, deaf to all signals."""

    def __init__(self):
        top, self._v1 = _mount_point("cgroup", "freezer"), True
        if top is None:
            top, self._v1 = _mount_point("cgroup2"), False
        if top is None:
            pytest.skip("no freezer: neither cgroup v1 nor v2 is mounted")
        self._path = top / f"sksm-test-{os.getpid()}"
        self._path.mkdir()

    def add(self, pid):
        (self._path / "cgroup.procs").write_text(str(pid))

    def freeze(self):
        self._tell("FROZEN" if self._v1 else "1")

    def thaw(self):
        self._tell("THAWED" if self._v1 else "0")

    def _tell(self, word):
        knob = self._path / ("freezer.state" if self._v1 else "cgroup.freeze")
        knob.write_text(word)
        if self._v1:
            poll(lambda: knob.read_text().strip() == word)
        else:
            frozen = self._path / "cgroup.events"
            poll(lambda: f"frozen {word}" in frozen.read_text())

    def close(self):
        """Remove the group; its processes go to the one above."""
        self.thaw()
        for pid in (self._path / "cgroup.procs").read_text().split():
            (self._path.parent / "cgroup.procs").write_text(pid)
        self._path.rmdir()
