"""`sksm stat`: what real processes share, counted from outside."""

import errno
import os
import signal
import socket

import numpy as np
import psutil
import pytest

import sksm
from sksm.commands import sharing
from sksm.linux import pagemap
from sksm.spans import PAGE_SIZE
from tests.conftest import daemon_pid, poll
from tests.puppets import Obedient
from tests.rows import content

pytestmark = pytest.mark.usefixtures("runtime")

PAGES = 512


class Merges(Obedient):
    """Holds what every other of them holds, merged."""

    def merge(self):
        self.array = sksm.empty((PAGES, PAGE_SIZE), np.uint8)
        self.array[:] = content(7, PAGES)
        return sksm.merge(self.array).scanned

    def write(self, page):
        self.array[page] ^= 255


@pytest.fixture
def merged(puppets):
    """Two processes that share pages."""
    found = []
    for _ in range(2):
        found.append(puppets(Merges))
        assert found[-1].merge() == PAGES
    return found


@pytest.fixture
def sharers(sksm_program, answer_of):
    """Give `sharers(puppets)`: their entries, and the pool they are found in."""

    def ask(workers):
        answer = answer_of(sksm_program("stat", "--json").stdout)
        for pool in answer["pools"]:
            entries = {entry["pid"]: entry for entry in pool["sharers"]}
            if workers[0].pid in entries:
                return answer, pool, [entries[one.pid] for one in workers]
        raise AssertionError("the workers are not listed")

    return ask


def test_sharers_are_listed_with_what_they_share(merged, sharers, runtime):
    """Bytes mapped, bytes not copied since, and the pool behind both, once."""
    answer, pool, entries = sharers(merged)
    size = PAGES * PAGE_SIZE
    for entry in entries:
        assert entry["shared_bytes"] == entry["mapped_bytes"]
        assert 0.9 * size < entry["mapped_bytes"] <= size
        assert entry["name"].startswith("python")
    assert 0.9 * size < pool["pool_bytes"] <= size
    assert pool["exact"] is True
    assert pool["daemon_pid"] == answer["daemon"]["pid"] == daemon_pid(runtime)
    assert answer["daemon"]["clients"] == 2


def test_page_that_was_written_is_shared_no_more(merged, sharers):
    """The kernel's word, not our count of what was merged."""
    _, _, (first, _) = sharers(merged)
    merged[1].write(PAGES // 2)
    _, _, (same, other) = sharers(merged)
    assert same | {"pss_bytes": 0} == first | {"pss_bytes": 0}
    assert other["shared_bytes"] == first["shared_bytes"] - PAGE_SIZE
    assert other["mapped_bytes"] == first["mapped_bytes"]


def test_saving_is_net_and_adds_up(merged, sharers):
    """Shared pages, less pool, daemon and mappings: here less than nothing."""
    answer, _, _ = sharers(merged)
    pools = answer["pools"]
    shared = sum(one["shared_bytes"] for pool in pools for one in pool["sharers"])
    mappings = sum(one["mappings"] for pool in pools for one in pool["sharers"])
    own = sum(pool["pool_bytes"] + pool["daemon_bytes"] for pool in pools)
    assert answer["shared_bytes"] == shared
    assert answer["mapping_bytes"] == mappings * answer["vma_bytes"]
    by_ksm = answer["ksm"].get("saved_bytes", 0)
    assert answer["saved_bytes"] == shared - own - answer["mapping_bytes"] + by_ksm
    assert answer["vma_measured"] == (os.geteuid() == 0)


def test_pool_of_a_daemon_that_died_is_still_shown(merged, sharers, runtime):
    """What is mapped is shared, whoever owned it."""
    pid = daemon_pid(runtime)
    os.kill(pid, signal.SIGKILL)
    poll(lambda: not psutil.pid_exists(pid))
    answer, pool, entries = sharers(merged)
    assert answer["daemon"] is None
    assert pool["daemon_pid"] is None
    assert pool["pool_bytes"] > 0
    assert all(entry["shared_bytes"] for entry in entries)


def test_without_daemon_it_says_so_and_starts_none(sksm_here, runtime):
    """Looking changes nothing."""
    result = sksm_here("stat")
    assert result.exit_code == 0
    assert "No sksmd runs for you" in result.stdout
    assert daemon_pid(runtime) is None


@pytest.mark.usefixtures("merged", "in_80_columns")
def test_text_fits_a_terminal(sksm_program):
    """In 80 columns, and it names the parts of the sum."""
    text = sksm_program("stat").stdout
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "less the pool" in text
    assert "sksmd's own memory" in text


def test_daemon_that_is_none_exits_with_5(sksm_here, runtime):
    """Somebody else serves its socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(runtime / "sksmd.sock"))
        listener.listen()
        pid = os.fork()
        if pid == 0:
            listener.accept()[0].close()  # it looks whether anybody is there
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.send(b"no MessagePack")
            os._exit(0)
        result = sksm_here("stat")
        os.waitpid(pid, 0)
    (runtime / "sksmd.sock").unlink()
    assert result.exit_code == 5
    assert "not sksmd" in result.stderr


def test_copied_pages_are_counted_by_the_table_of_entries_too(
    memory, different, monkeypatch
):
    """Kernels before 6.7 have no PAGEMAP_SCAN: the same answer, page by page."""
    some = memory(64)
    some.rows[:] = different(64)
    sksm.merge(some.rows)
    some.rows[10:13, 0] ^= 1

    def lacking(*_, **__):
        raise OSError(errno.ENOTTY, "ENOTTY")

    table = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        assert sharing.copied_bytes(table, some.span) == 3 * PAGE_SIZE
        monkeypatch.setattr(pagemap, "scan", lacking)
        assert sharing.copied_bytes(table, some.span) == 3 * PAGE_SIZE
    finally:
        os.close(table)
