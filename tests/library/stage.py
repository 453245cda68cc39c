"""Actors seen from the test that directs them, each with its shadow copy."""

import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


class Process:
    """One actor, and what its memory must hold."""

    def __init__(self, listener):
        self.socket, _ = listener.accept()
        raw = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid = int.from_bytes(raw[:4], sys.byteorder)
        self.shadow = {}  # name -> bytes
        self.fixed = {}  # name -> for each page whether it is read-only
        self.mapped = set()  # names of those made by mmap, not by malloc

    def do(self, name, *args):
        self.socket.send(pickle.dumps((name, args)))
        done, value = pickle.loads(self.socket.recv(1 << 20))
        assert done, value
        return value

    def look(self):
        found = {n: np.frombuffer(b, np.uint8) for n, b in self.do("content").items()}
        assert found.keys() == self.shadow.keys()
        for name, expected in self.shadow.items():
            wrong = np.flatnonzero(found[name] != expected)
            assert not len(wrong), f"{name} of {self.pid} differs at {wrong[0]:#x}"

    def forked(self, listener):
        self.do("fork")
        child = Process(listener)
        child.shadow = {name: rows.copy() for name, rows in self.shadow.items()}
        child.fixed = {name: list(fixed) for name, fixed in self.fixed.items()}
        child.mapped = set(self.mapped)
        return child


class Stage:
    """A socket that actors connect to, and a process from which all are forked."""

    def __init__(self, path):
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(path)
        self.listener.listen(2)
        self.listener.settimeout(30)
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.library.actor", path], cwd=ROOT
        )
        self.first = Process(self.listener)

    def close(self):
        self.first.socket.close()
        self._popen.wait(30)
        self.listener.close()
