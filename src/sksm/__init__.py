"""Synchronous same-page merging on stock Linux."""

from sksm.api import (
    Stats,
    asarray,
    empty,
    merge,
    merge_range,
    stats,
    unmerge,
    unmerge_range,
)
from sksm.errors import (
    DaemonUnreachable,
    NotPermitted,
    ProcessGone,
    SksmError,
    Unsupported,
)
from sksm.report import MergeReport

__all__ = [
    "DaemonUnreachable",
    "MergeReport",
    "NotPermitted",
    "ProcessGone",
    "SksmError",
    "Stats",
    "Unsupported",
    "asarray",
    "empty",
    "merge",
    "merge_range",
    "stats",
    "unmerge",
    "unmerge_range",
]
