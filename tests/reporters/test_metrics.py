"""Metrics of a service, read from its server as Prometheus would."""

import socket
import urllib.request

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from sksm.errors import Misconfigured
from sksm.process import guards, runtimes
from sksm.reporters import metrics
from sksm.reporters.metrics import Metrics, kind_of, served
from tests.figures import figures, process, refusal

pytestmark = [pytest.mark.check, pytest.mark.pure]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as there:
        return there.getsockname()[1]


def scraped(port):
    """Give the samples by name and labels."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics",
        headers={"Accept": "application/openmetrics-text; version=1.0.0"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        kind = answer.headers["Content-Type"]
        text = answer.read().decode()
    assert kind.startswith("application/openmetrics-text")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def scanner():
    """Give what hears of epochs, and `scrape()`."""
    port = free_port()
    with served(str(port)) as tell:
        yield tell, lambda: scraped(port)


def test_what_was_told_is_served(scanner):
    """As OpenMetrics, under the names that docs/service.md has."""
    tell, scrape = scanner
    tell(
        figures(
            processes=[process(1)],
            refused=[refusal(2, "it says no"), refusal(3, "it says no")],
            read_bytes=4096,
            unmerged_pages=5,
            stopped_seconds=[0.002, 0.003],
        )
    )
    found = scrape()
    assert found["sksm_merged_bytes",] == 4 << 20
    assert found["sksm_watched_bytes",] == 8 << 20
    assert found["sksm_pool_bytes",] == found["sksm_own_bytes",] == 1 << 20
    assert found["sksm_saved_net_bytes",] == 2 << 20
    assert found["sksm_processes",] == 1
    assert found["sksm_refused_processes", "it says no"] == 2
    assert found["sksm_epochs_total",] == 1
    assert found["sksm_read_bytes_total",] == 4096
    assert found["sksm_unmerged_pages_total",] == 5
    assert found["sksm_cpu_seconds_total",] == 0.5
    assert found["sksm_epoch_cpu_seconds_count",] == 1
    assert found["sksm_stop_seconds_count",] == 2
    assert found["sksm_stop_seconds_sum",] == pytest.approx(0.005)


def test_counters_go_on_whatever_figures_say(scanner):
    """Also if those fall: what was counted stays counted."""
    tell, scrape = scanner
    before = {}
    for pages, cpu, stops in ((5, 1.0, [0.1]), (2, 0.4, []), (9, 3.0, [0.2])):
        tell(
            figures(
                unmerged_pages=pages,
                cpu_seconds=cpu,
                read_bytes=10,
                stopped_seconds=stops,
            )
        )
        now = {k: v for k, v in scrape().items() if k[0].endswith(("_total", "_count"))}
        assert all(now[name] >= value for name, value in before.items())
        before = now
    assert before["sksm_read_bytes_total",] == 30
    assert before["sksm_unmerged_pages_total",] == 12
    assert before["sksm_stop_seconds_count",] == 2


def test_who_is_no_longer_refused_does_not_count(scanner):
    """The reason stays, with nobody."""
    tell, scrape = scanner
    tell(figures(refused=[refusal(2, "it says no")]))
    tell(figures())
    assert scrape()["sksm_refused_processes", "it says no"] == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("process 12 may not be looked at: x", "process 345 may not be looked at: x"),
        (guards._traced(1), guards._traced(2)),
        ("it belongs to uid 7: run this", "it belongs to uid 1000: run this"),
        ("shared with process 12", "shared with process 13"),
    ],
)
def test_a_reason_is_the_same_for_all_processes(one, other):
    """Numbers and names in it make no label of their own."""
    assert kind_of(one) == kind_of(other)


def test_reasons_stay_apart():
    """What differs in words is another reason."""
    reasons = [guards.IO_URING, guards.VFIO, guards.GPU, runtimes.UNKNOWN, guards.OURS]
    assert len({kind_of(reason) for reason in reasons}) == len(reasons)


def test_there_are_only_so_many_reasons():
    """Those that come later are others."""
    registry = CollectorRegistry()
    told = Metrics(registry)
    reasons = [chr(0x3041 + number) * 3 for number in range(metrics._MOST_REASONS + 9)]
    told.tell(figures(refused=[refusal(1, reason) for reason in reasons]))
    (family,) = (
        one for one in registry.collect() if one.name == "sksm_refused_processes"
    )
    counts = {sample.labels["reason"]: sample.value for sample in family.samples}
    assert len(counts) == metrics._MOST_REASONS + 1
    assert counts["other"] == 9


def test_a_port_that_is_taken_is_an_error_that_names_the_setting():
    """And so is a host that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as there:
        where = f"127.0.0.1:{there.getsockname()[1]}"
        with pytest.raises(Misconfigured, match=rf'metrics = "{where}".*in use'):
            served(where).__enter__()
    with pytest.raises(Misconfigured, match=r'metrics = "192\.0\.2\.1:9105"'):
        served("192.0.2.1:9105").__enter__()


def test_the_server_ends_with_the_block():
    """Its port is free again, for the next."""
    port = free_port()
    for _ in range(2):
        with served(f"127.0.0.1:{port}"):
            assert scraped(port)["sksm_epochs_total",] == 0
