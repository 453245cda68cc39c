"""A daemon whose options, limits and end are the test's, and clients of it."""

import pytest

from tests.puppets import Puppet
from tests.support import Daemon


@pytest.fixture
def daemons(runtime):
    """Give `daemons(idle=...)`: sksmd in the test's own runtime directory."""
    started = []

    def start(**options):
        started.append(Daemon(runtime, **options))
        return started[-1]

    yield start
    for one in started:
        one.end()


@pytest.fixture
def daemon(daemons):
    """A daemon that does not leave by itself."""
    return daemons()


@pytest.fixture
def puppets():
    """Give `puppets()`: one more process that does what it is told."""
    started = []

    def start():
        started.append(Puppet())
        return started[-1]

    yield start
    for one in started:
        one.end()
