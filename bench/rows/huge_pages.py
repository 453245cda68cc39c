"""Memory in huge pages, whose every small page was offered before."""

from __future__ import annotations

from bench.results import Goal, Options, Row
from bench.rows import second_copy

_OF_THE_FLOOR = Goal(at_least=0.7)


def measure(options: Options) -> Row:
    """Measure as for small pages; the kernel says how the buffers really lie."""
    return Row(second_copy.compare(options, huge=True).measures(_OF_THE_FLOOR))
