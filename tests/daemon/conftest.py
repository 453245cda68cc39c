"""A daemon whose options, limits and end are the test's."""

import pytest

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
