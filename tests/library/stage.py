"""Actors seen from the test that directs them, each with its shadow copy."""

import numpy as np


class Process:
    """One actor, a puppet, and what its memory must hold."""

    def __init__(self, puppet):
        self.puppet, self.pid = puppet, puppet.pid
        self.shadow = {}  # name -> bytes
        self.fixed = {}  # name -> for each page whether it is read-only
        self.mapped = set()  # names of those made by mmap, not by malloc

    def do(self, name, *args):
        return getattr(self.puppet, name)(*args)

    def look(self):
        found = {n: np.frombuffer(b, np.uint8) for n, b in self.do("content").items()}
        assert found.keys() == self.shadow.keys()
        for name, expected in self.shadow.items():
            wrong = np.flatnonzero(found[name] != expected)
            assert not len(wrong), f"{name} of {self.pid} differs at {wrong[0]:#x}"

    def forked(self):
        child = Process(self.puppet.split())
        child.shadow = {name: rows.copy() for name, rows in self.shadow.items()}
        child.fixed = {name: list(fixed) for name, fixed in self.fixed.items()}
        child.mapped = set(self.mapped)
        return child
