"""What the daemon itself costs."""

from pathlib import Path

import numpy as np
import pytest

from sksm.store.index import Index

pytestmark = pytest.mark.own_start

MIB = 1 << 20


def private_bytes(pid):
    """Memory that would be free without that process, from smaps."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = [line.split() for line in lines if line.startswith("Private_")]
    return 1024 * sum(int(words[1]) for words in private)


def test_daemon_needs_less_than_40_mib_of_its_own(daemon):
    """Before it holds any data."""
    assert private_bytes(daemon.pid) < 40 * MIB, private_bytes(daemon.pid) / MIB


def test_daemon_grows_by_no_more_than_its_index(daemon, puppets):
    """Pages on their way into the pool do not stay in its own memory."""
    puppet = puppets()
    puppet.fill("data", 1, 16384)
    puppet.merge("data")

    status = daemon.status()

    assert status.pool_bytes == 64 * MIB
    assert status.index_bytes <= 24 * status.slots
    assert private_bytes(daemon.pid) < 40 * MIB + status.index_bytes + 16 * MIB


@pytest.mark.parametrize("step", [1024, 4096, 100_000])
def test_index_needs_at_most_24_bytes_a_page(step):
    """At every size on the way up, from where its smallest table is outgrown."""
    index, generator = Index(), np.random.default_rng(1)
    pages = 0
    while pages < 1_000_000:
        prints = generator.integers(0, 2**64, step, np.uint64)
        index.insert(prints, np.arange(pages, pages + step))
        pages += step
        assert pages < 8192 or index.nbytes <= 24 * pages, (pages, index.nbytes)
        if step < 100_000 and pages > 200_000:
            break
