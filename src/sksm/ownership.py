"""Giving memory its plain nature back before its owner frees it.

malloc may clear memory by dropping its pages, which works for anonymous memory
and would bring the pool's bytes back for merged memory. So when an array that
was merged dies, fresh anonymous pages take the place of the pool's first: numpy
clears weak references before it frees the data, and refuses to resize an array
that has any.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from sksm import pages
from sksm.linux import maps
from sksm.process.local import ThisProcess
from sksm.spans import Span

_watched: dict[int, list[Span]] = {}


def watch(owner: np.ndarray[Any, Any], span: Span) -> None:
    """Make `span`, part of the memory of `owner`, plain again before it is freed."""
    key = id(owner)
    if key not in _watched:
        _watched[key] = []
        # At exit nobody allocates any more: no need to.
        weakref.finalize(owner, _restore, key).atexit = False
    if span not in _watched[key]:
        _watched[key].append(span)


def _restore(key: int) -> None:
    for span in _watched.pop(key):
        with ThisProcess() as space:
            for mapping in maps.every_mapping("self"):
                part = mapping.span & span
                if part.pages and pages.is_pool(mapping):
                    space.forget(part, mapping.prot)
