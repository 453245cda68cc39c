"""Merged again and again, a program goes on as if nothing had been."""

import time

import pytest

from sksm.linux.features import Feature
from tests.conftest import poll
from tests.process import disturb, merging

pytestmark = [
    pytest.mark.needs(
        Feature.PTRACE_SEIZE, Feature.USERFAULTFD_WP, Feature.PIDFD_GETFD
    ),
    pytest.mark.usefixtures("unhurried"),
]

FAST_SECONDS, SLOW_SECONDS = 1.0, 20.0
slow = pytest.mark.slow

# What the main thread does: it is the one that is borrowed, as a rule. Chosen for
# the fast tests is what differs most for the kernel.
ROLES = {"registers": 9, "calls": 26, "signals": 5, "lives": 7}
FAST = [
    ("threads", 6, 16),
    ("registers", 0),  # integers
    ("registers", 2),  # flags
    ("calls", 0),  # a sleep that goes on where it was
    ("calls", 21),  # sigsuspend
    ("signals", 0),
    ("signals", 2),  # masks that change
    ("lives", 0),
    ("lives", 2),  # vfork
    ("execs", 1),
    ("execs", 3),
    ("rseq", 4),
]
ALL = [
    ("threads", 2, 4),
    ("threads", 30, 64),
    ("execs", 8),
    ("rseq", 16),
    *((name, role) for name, roles in ROLES.items() for role in range(roles)),
]
COMES_BACK = {"execs"}  # the process is another one by and by


def for_seconds(seconds):
    """Say whether that many seconds are not over yet, each time it is asked."""
    until = time.monotonic() + seconds
    return lambda: time.monotonic() < until


def label(program):
    return "-".join(map(str, program))


@pytest.mark.limit(300)
@pytest.mark.parametrize(
    ("program", "seconds"),
    [
        *(pytest.param(one, FAST_SECONDS, id=label(one)) for one in FAST),
        *(
            pytest.param(one, SLOW_SECONDS, id=f"{label(one)}-long", marks=slow)
            for one in dict.fromkeys(FAST + ALL)
        ),
    ],
)
def test_a_program_that_is_merged_notices_nothing(target, program, seconds):
    """Two of them, with equal pages, into one pool after another.

    All the while they check every byte, register, signal and result, and they are
    asked at the end. What the kernel says to anyone who was stopped is allowed.
    """
    pair = [target(*program), target(*program)]
    total, gone = merging.merge_in_turns(pair, for_seconds(seconds))
    for _ in range(15):  # others may have the processors, and no thread stops in time
        if gone or total.merged + total.stored + total.zero:
            break
        total, gone = merging.merge_in_turns(pair, for_seconds(seconds))
    for one in pair:
        assert one.process.poll() is None, one
        one.goes_on()
        poll(one.let_go)
        interrupted = {
            name for name, count in one.named("interrupted").items() if count
        }
        assert interrupted <= disturb.EINTR_BY_ANY_STOP
        one.ends_well()
    if program[0] not in COMES_BACK:
        assert not gone, "".join(gone[0])
        assert total.merged + total.stored + total.zero > 0, total
