"""Addresses in our own memory at which to build what will replace other pages."""

from __future__ import annotations

from collections.abc import Sequence

from sksm.linux import libc
from sksm.process import Exchange
from sksm.process.script import STAGE_BYTES
from sksm.spans import HUGE_SIZE


class Scratch:
    """Addresses at which to build the mappings that will replace others.

    A mapping that moves leaves a hole, which belongs to whoever maps next; so
    the end unmaps exactly the pieces that did not move.
    """

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self.addresses: list[int] = []
        self.moved: list[bool] = []
        self.unsure = False  # the list may have run, and nobody knows what moved
        self._exchanges = exchanges
        self._bytes = STAGE_BYTES + sum(
            room(item) for item in exchanges if item.slot is not None
        )

    def __enter__(self) -> Scratch:
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
        self._start = libc.mmap(None, self._bytes, libc.PROT_NONE, flags, -1, 0)
        self.stage = self._start
        rw = libc.PROT_READ | libc.PROT_WRITE
        # SAFETY: the first pages of what was just mapped.
        try:
            libc.mprotect(self.stage, STAGE_BYTES, rw)
        except OSError:
            libc.munmap(self._start, self._bytes)
            raise
        at = self._start + STAGE_BYTES
        for item in self._exchanges:
            self.addresses.append(beside(at, item))
            at += room(item) if item.slot is not None else 0
        return self

    def __exit__(self, *_: object) -> None:
        if self.unsure:  # Ctrl-C just then: better leave addresses behind than
            return  # unmap what another thread has mapped in the holes
        at = self._start
        moved = zip(self.addresses, self._exchanges, self.moved, strict=False)
        for address, item, gone in moved:
            if gone:
                _unmap(at, address)
                at = address + item.span.size
        _unmap(at, self._start + self._bytes)


def room(item: Exchange) -> int:
    """Say how many bytes of addresses `beside` may need for an item."""
    return item.span.size + (HUGE_SIZE if item.span.size >= HUGE_SIZE else 0)


def beside(at: int, item: Exchange) -> int:
    """Round `at` up so that whole page tables can move to the item's span."""
    if item.span.size < HUGE_SIZE:
        return at
    return at + (item.span.start - at) % HUGE_SIZE


def _unmap(start: int, stop: int) -> None:
    if start < stop:
        libc.munmap(start, stop - start)
