"""Whatever answers in the daemon's place, the client keeps its bytes."""

import os
import signal
import socket

import numpy as np
import pytest

import sksm
from sksm.daemon import client, protocol
from sksm.daemon.client import RemoteStore
from sksm.errors import DaemonUnreachable, SksmError
from sksm.spans import PAGE_SIZE
from tests.conftest import Memory
from tests.rows import content
from tests.support import start_child


class Impostor:
    """Something that listens where sksmd should, and gives set answers."""

    def __init__(self, runtime, answers):
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(runtime / "sksmd.sock"))
        self._listener.listen()
        self._pool = os.memfd_create("impostor")
        os.ftruncate(self._pool, 64 * PAGE_SIZE)
        self.pid = start_child(lambda: self._serve(answers))

    def _serve(self, answers):
        while True:
            line, _ = self._listener.accept()
            for answer in answers:
                if not line.recv(protocol.LARGEST):
                    break
                if isinstance(answer, protocol.Granted):
                    socket.send_fds(line, [protocol.encode(answer)], [self._pool])
                elif answer is not None:
                    line.send(answer if isinstance(answer, bytes) else encode(answer))
            else:
                line.recv(protocol.LARGEST)
            line.close()

    def end(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._listener.close()
        os.close(self._pool)


encode = protocol.encode
WELCOME = protocol.Welcome(protocol.VERSION, 1, 7, "impostor")
GRANTED = protocol.Granted()


def slots(*numbers):
    return protocol.Slots(np.array(numbers, np.int64).tobytes())


@pytest.mark.check
@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([b"\xc1 nonsense"], "not sksmd"),
        ([protocol.Failure("no time")], "sksmd refused: no time"),
        ([slots(1)], "out of turn"),
        ([WELCOME, WELCOME], "out of turn"),
        ([WELCOME, b"x" * (protocol.LARGEST + 9)], "not sksmd"),
        ([WELCOME, GRANTED, slots(0, 1)], "miscounts"),
        ([WELCOME, GRANTED, slots(0, 1, 2, 64)], "slots it has not"),
        ([WELCOME, GRANTED, slots(0, 1, 2, 2**61)], "slots it has not"),
        ([WELCOME, GRANTED, slots(0, 1, 2, 3)], None),  # bytes differ: changed
        ([None], "no answer in"),
        ([WELCOME, None], "no answer in"),
        ([WELCOME, GRANTED, None], "no answer in"),
    ],
)
def test_whatever_the_daemon_answers_the_bytes_stay(
    runtime, monkeypatch, answers, message
):
    """It is a hint, compared before it is believed; nonsense is a clear error."""
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 0.3)
    impostor = Impostor(runtime, answers)
    some = Memory(4)
    some.rows[:] = content(3, 4)
    try:
        if message:
            kinds = (DaemonUnreachable, SksmError)
            with pytest.raises(kinds, match=message):
                sksm.merge(some.rows)
        else:
            assert sksm.merge(some.rows).changed == 4
        assert (some.rows == content(3, 4)).all()
    finally:
        impostor.end()


def test_a_client_of_another_version_is_told_what_to_do(runtime, daemon, monkeypatch):
    """After an update the old daemon is still there: the message says how to end it."""
    monkeypatch.setattr(protocol, "VERSION", protocol.VERSION + 1)
    with pytest.raises(SksmError, match=f"version.*kill {daemon.pid}"):
        RemoteStore(start=False)
