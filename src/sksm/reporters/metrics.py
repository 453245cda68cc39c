"""OpenMetrics of a scanner, served over HTTP."""

from __future__ import annotations

import contextlib
import re
from collections import Counter as Counts
from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    start_http_server,
)

from sksm.errors import Misconfigured
from sksm.scanner.figures import Figures
from sksm.scanner.schema import address

_GAUGES = {
    "merged_bytes": "Memory of watched processes that shows pages of a pool.",
    "pool_bytes": "Memory that the pools, or KSM, occupy.",
    "saved_net_bytes": "Merged, less pools, ourselves and mappings.",
    "watched_bytes": "Memory of watched processes that is looked at.",
    "own_bytes": "Memory of the scanner and of the stores.",
}
_EPOCH_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0)
_STOP_BUCKETS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.1, 1.0)
_MOST_REASONS = 30  # a label's values stay for as long as we run
_OTHER = "other"


class Metrics:
    """Counts what figures say, for a registry.

    Counters go on from epoch to epoch, whatever becomes of processes and stores.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._before: Figures | None = None
        self._gauges = {
            name: Gauge(f"sksm_{name}", text, registry=registry)
            for name, text in _GAUGES.items()
        }
        self._processes = Gauge("sksm_processes", "Watched.", registry=registry)
        self._refused = Gauge(
            "sksm_refused_processes",
            "Processes that rules name and that are left alone.",
            ["reason"],
            registry=registry,
        )
        self._reasons: set[str] = set()
        self._epochs = Counter("sksm_epochs", "Looks at everybody.", registry=registry)
        self._read = Counter(
            "sksm_read_bytes", "Memory read to find equal pages.", registry=registry
        )
        self._unmerged = Counter(
            "sksm_unmerged_pages", "Merged pages written to.", registry=registry
        )
        self._cpu = Counter(
            "sksm_cpu_seconds",
            "Processor time, the stores' and ksmd's too.",
            registry=registry,
        )
        self._epoch_cpu = Histogram(
            "sksm_epoch_cpu_seconds",
            "Processor time from the end of one epoch to that of the next.",
            buckets=_EPOCH_BUCKETS,
            registry=registry,
        )
        self._stops = Histogram(
            "sksm_stop_seconds",
            "How long processes were stopped, each time.",
            buckets=_STOP_BUCKETS,
            registry=registry,
        )

    def tell(self, found: Figures) -> None:
        """Count what an epoch brought."""
        for name, gauge in self._gauges.items():
            gauge.set(getattr(found, name))
        self._processes.set(len(found.processes))
        self._count_refused(found)
        before, self._before = self._before, found
        self._epochs.inc()
        self._read.inc(found.read_bytes)
        pages = before.unmerged_pages if before else 0
        self._unmerged.inc(max(0, found.unmerged_pages - pages))
        cpu = found.cpu_seconds - (before.cpu_seconds if before else 0.0)
        self._cpu.inc(max(0.0, cpu))
        self._epoch_cpu.observe(max(0.0, cpu))
        for seconds in found.stopped_seconds:
            self._stops.observe(seconds)

    def _count_refused(self, found: Figures) -> None:
        counts: Counts[str] = Counts()
        for one in found.refused:
            kind = kind_of(one.reason)
            if kind not in self._reasons and len(self._reasons) >= _MOST_REASONS:
                kind = _OTHER
            self._reasons.add(kind)
            counts[kind] += 1
        for kind in self._reasons:
            self._refused.labels(kind).set(counts[kind])


def kind_of(reason: str) -> str:
    """Leave out of a reason what is different for each process."""
    reason = re.sub(r"^process \d+[ :]+", "", reason)
    reason = re.sub(r"traced by .* \(\d+\)", "traced by another process", reason)
    return re.sub(r"\d+", "N", reason)


@contextlib.contextmanager
def served(where: str) -> Iterator[Callable[[Figures], None]]:
    """Serve metrics in the block, from threads; gives what is to hear of epochs.

    Args:
        where: as the setting has it.

    Raises:
        Misconfigured: that cannot be served at.
    """
    registry = CollectorRegistry()
    host, port = address(where)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:  # or it knows no such host
        raise Misconfigured(
            f'metrics = "{where}" cannot be served: {error.strerror}. Name another '
            "port in the configuration, or end what serves there"
        ) from error
    try:
        yield Metrics(registry).tell
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
