"""Short names for page contents. Equal pages have equal names; not the reverse."""

from __future__ import annotations

import functools
import itertools
import os

import numpy as np
import numpy.typing as npt
import xxhash

from sksm.spans import PAGE_SIZE


def new_seed() -> int:
    """Choose a seed that nobody can guess.

    `secrets` would do the same, and take the memory of OpenSSL along.
    """
    return int.from_bytes(os.urandom(8), "little")


def fingerprint(contents: npt.NDArray[np.uint8], seed: int) -> npt.NDArray[np.uint64]:
    """Name each row of `contents` by its XXH3-64 digest under `seed`.

    The seed is a store's secret: who does not know it cannot make up pages that
    collide, which would cost merges (never bytes: those are compared).
    """
    digest = xxhash.xxh3_64_intdigest
    names = map(digest, contents, itertools.repeat(seed))
    return np.fromiter(names, np.uint64, len(contents))


@functools.cache
def of_zeros(seed: int) -> int:
    """Name the page that holds nothing but zeros."""
    return int(fingerprint(np.zeros((1, PAGE_SIZE), np.uint8), seed)[0])
