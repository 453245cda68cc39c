"""A scanner whose clock the tests turn, and whom it watches."""

import pytest

from sksm.linux import ksm
from sksm.linux.features import Feature
from sksm.scanner.scanner import Scanner, Target
from tests.process.holder import Holder

QUIET = 4.0

# Marks of tests that watch processes; and of those in which the kernel merges them.
WATCHING = pytest.mark.needs(
    Feature.USERFAULTFD_WP_ASYNC, Feature.PTRACE_SEIZE, Feature.PIDFD_GETFD
)
IN_PLACE = [
    pytest.mark.machine,
    pytest.mark.root,
    WATCHING,
    pytest.mark.usefixtures("runtime", "ksmd_rests"),
    pytest.mark.skipif(not ksm.FOLDER.exists(), reason="the kernel has no KSM"),
]


@pytest.fixture(autouse=True)
def _unhurried(unhurried):
    """What could not be stopped on a loaded machine would be left alone for a while."""


class World:
    """A scanner, its clock, and whom it watches."""

    def __init__(self):
        self.time = 1000.0
        self.targets = {}
        self.scanner = Scanner(lambda: self.targets, QUIET, lambda: self.time)

    def epochs(self, count, seconds=1.0):
        done = []
        for _ in range(count):
            done.append(self.scanner.epoch())
            self.time += seconds
        return done

    def member(self, pid):
        (found,) = (
            group.members[pid]
            for group in self.scanner.groups.values()
            if pid in group.members
        )
        return found


@pytest.fixture
def world():
    made = World()
    yield made
    made.scanner.close()


@pytest.fixture
def holder(puppets, world):
    """Give `holder(kinds)`: a process that holds these pages, watched."""

    def start(kinds):
        one = Holder(puppets, kinds)
        world.targets[one.pid] = Target()
        return one

    return start
