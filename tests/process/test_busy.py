"""A program that cannot be stopped at some moment is merged at another."""

import contextlib
import errno
import os

import pytest

from sksm.engines.pool import PoolEngine
from sksm.errors import SksmError
from sksm.linux.features import Feature
from sksm.pipeline import merge_all
from sksm.process import borrowing
from sksm.process.other import OtherProcess
from sksm.store.local import LocalStore
from tests.process import merging

pytestmark = pytest.mark.needs(
    Feature.PTRACE_SEIZE, Feature.USERFAULTFD_WP, Feature.PIDFD_GETFD
)


class Busy:
    """A hook that lets one of the attempts to stop a program fail."""

    def __init__(self, threads, number):
        self._left = number
        for name in ("hold_all", "hold_one"):
            setattr(threads, name, self._around(getattr(threads, name)))

    def _around(self, inner):
        def hold(*args):
            self._left -= 1
            if self._left == -1:
                raise BlockingIOError(errno.EBUSY, "not now")
            return inner(*args)

        return hold

    @property
    def happened(self):
        return self._left < 0


@pytest.mark.usefixtures("unhurried")  # all other attempts succeed
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.limit(600)
def test_a_program_that_could_not_be_stopped_once_is_merged_the_next_time(target, step):
    """Whichever attempt it was: nothing is mistaken for something else later."""
    one = target("threads", 2, 1)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(0, 1000, step):
        store = LocalStore()
        with contextlib.closing(store), OtherProcess(one.pid) as space:
            busy = Busy(space._threads, number)
            merge_all(space, one.spans(), engine=PoolEngine(store))
            report = merge_all(space, one.spans(), engine=PoolEngine(store))
            missed = [why for why in report.reasons if "last page" not in why]
            assert not busy.happened or not missed, (number, missed)
        if not busy.happened:
            break
    assert number > 5, "hardly an attempt was made"
    assert len(os.listdir("/proc/self/fd")) <= before
    one.goes_on()
    names = [os.path.basename(link) for link in one.links()]
    assert not [name for name in names if "sksm" in name or "userfault" in name]
    one.ends_well()


class Broken(Exception):
    """What nobody expects."""


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.limit(600)
def test_a_merge_that_breaks_off_anywhere_leaves_a_program_that_goes_on(
    target, monkeypatch, step
):
    """Also while one of its threads works for us, which then finds back by itself."""
    one = target("threads", 2, 1)
    left = [0]

    def breaking(inner):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                raise Broken
            return inner(*args, **kwargs)

        return call

    for name in ("_hear", "_run_to_syscall", "_take_back"):
        inner = getattr(borrowing.Thread, name)
        monkeypatch.setattr(borrowing.Thread, name, breaking(inner))
    for number in range(0, 10_000, step):
        left[0] = number
        store = LocalStore()
        with contextlib.closing(store), contextlib.suppress(Broken, OSError):
            merging.merge(one, store)
        happened = left[0] < 0
        left[0] = 1 << 30
        one.goes_on()
        if not happened:
            break
    assert number > 50, "hardly a step was met"
    one.ends_well()


@pytest.mark.root  # the barrier of others does not see system calls: they would fail
def test_writers_wait_for_a_list_that_we_have_given_up(target, monkeypatch):
    """It exchanges pages yet that were compared: no write to them may come between."""
    one = target("threads", 4, 1)
    hear, calls = borrowing.Thread._hear, []

    def give_up(thread, *args):
        calls.append(1)
        if len(calls) % 2 == 0:  # it has begun, and is not at its end
            raise Broken
        hear(thread, *args)

    monkeypatch.setattr(borrowing.Thread, "_hear", give_up)
    for _ in range(40):
        store = LocalStore()
        with contextlib.closing(store), contextlib.suppress(Broken, OSError, SksmError):
            merging.merge(one, store)
    assert len(calls) >= 40, "hardly a list was begun"
    one.goes_on()
    one.ends_well()
