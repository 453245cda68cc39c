"""The filter of `sksm run`: what it stops, and that it stops nothing else."""

import os

import pytest

from sksm.linux import libc, notify, seccomp
from sksm.linux.seccomp import Action

pytestmark = pytest.mark.check

FILTERS = [notify.merge_filter()]
HIGH = 1 << 32  # above the int that the kernel looks at


@pytest.mark.parametrize("advice", [26, HIGH | 26])
def test_the_advice_stops_both_calls(advice):
    """Its upper half does not count, as in the kernel."""
    madvise, process = libc.SYS["madvise"], libc.SYS["process_madvise"]
    assert seccomp.verdict(FILTERS, madvise, (0, 0, advice)) == Action.USER_NOTIF
    assert seccomp.verdict(FILTERS, process, (0, 0, 0, advice)) == Action.USER_NOTIF


@pytest.mark.parametrize("number", range(470))
def test_nothing_else_is_stopped(number):
    """No other call, with any arguments; no other advice; no other architecture."""
    ours = number in (libc.SYS["madvise"], libc.SYS["process_madvise"])
    for args in ((), (26,) * 2, (0, 0, 25, 27), (26, 26, 0, 0, 26, 26)):
        assert seccomp.verdict(FILTERS, number, args) == Action.ALLOW
    every = seccomp.verdict(FILTERS, number, (26,) * 6)
    assert every == (Action.USER_NOTIF if ours else Action.ALLOW)
    other = seccomp.verdict(FILTERS, number, (26,) * 6, arch=0x40000003)  # i386
    assert other == Action.ALLOW


def test_a_call_that_went_away_is_no_error():
    """Its thread was killed, or stopped."""
    pid = os.fork()
    if pid == 0:
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        listener = notify.listen()
        gone = notify.Notification(1, os.getpid(), 28, (0,) * 6)
        right = not notify.answer(listener, gone, 0) and not notify.waits(
            listener, gone
        )
        os._exit(not right)
    assert os.waitpid(pid, 0)[1] == 0
