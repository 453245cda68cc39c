"""The call itself, on real memory: what is shared, what is kept."""

import errno
import os
import signal

import numpy as np
import pytest

import sksm
from sksm import session
from sksm.errors import SksmError
from sksm.process import CHANGED, DONE
from sksm.process.local import ThisProcess
from sksm.spans import PAGE_SIZE
from tests.conftest import frames

pytestmark = pytest.mark.usefixtures("runtime")


@pytest.mark.check
@pytest.mark.root
def test_equal_pages_share_a_frame_until_one_is_written(memory, different):
    """The promise of the whole system, with frame numbers as the oracle."""
    content = different(8)
    first, second = memory(8), memory(8)
    first.rows[:] = second.rows[:] = content

    sksm.merge(first.rows)
    report = sksm.merge(second.rows)

    assert report.merged == 8
    assert (first.rows == second.rows).all()
    assert (frames(first.span) == frames(second.span)).all()
    second.rows[3, 0] ^= 1
    assert (frames(first.span) == frames(second.span)).tolist() == [
        page != 3 for page in range(8)
    ]
    assert (first.rows == content).all()


def test_second_merge_changes_nothing(memory, different):
    """Merged memory is found merged by one scan."""
    some = memory(8)
    some.rows[:] = different(8)
    sksm.merge(some.rows)

    report = sksm.merge(some.rows)

    assert (report.already, report.scanned) == (8, 8)
    assert report.mappings_added == 0


def test_forked_child_merges_by_itself(memory, different):
    """A child opens its own connection; parent and child go on."""
    content = different(4)
    parent = memory(4)
    parent.rows[:] = content
    sksm.merge(parent.rows)
    pid = os.fork()
    if pid == 0:
        mine = sksm.empty((4, PAGE_SIZE), np.uint8)
        mine[:] = content
        done = sksm.merge(mine).merged == 4 and (mine == content).all()
        os._exit(0 if done else 1)
    assert os.waitpid(pid, 0)[1] == 0
    again = memory(4)
    again.rows[:] = content
    assert sksm.merge(again.rows).merged == 4


@pytest.mark.parametrize("call", ["merge", "unmerge"])
def test_a_signal_handler_in_the_middle_of_a_merge_is_told_so(
    area, different, monkeypatch, call
):
    """It would wait for itself; another thread's call waits for its turn."""
    one = area(5)
    one.rows[:] = different(5)
    told = []

    def handler(*_):
        with pytest.raises(SksmError, match="signal handler") as error:
            getattr(sksm, call)(one.rows)
        told.append(str(error.value))

    before = signal.signal(signal.SIGUSR1, handler)
    inner = session.merge
    monkeypatch.setattr(
        session,
        "merge",
        lambda *args, **named: (
            os.kill(os.getpid(), signal.SIGUSR1),
            inner(*args, **named),
        )[1],
    )
    try:
        assert sksm.merge_range(*one.where).stored == 4
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(told) == 1
    monkeypatch.undo()


@pytest.mark.parametrize("verdict", [DONE, CHANGED, errno.EPERM, errno.EBUSY])
def test_what_may_be_mapped_all_the_same_is_in_doubt(
    here, area, different, monkeypatch, verdict
):
    """An errno may come from a step behind the mapping, or of a thread given up."""
    one, told = area(5), []
    one.rows[:] = different(5)
    monkeypatch.setattr(
        ThisProcess, "exchange", lambda _, pool, items: [verdict] * len(items)
    )
    monkeypatch.setattr(here, "in_doubt", lambda: told.append(1))
    sksm.merge_range(*one.where)
    assert bool(told) == (verdict > 0)
