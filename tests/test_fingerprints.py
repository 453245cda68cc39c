"""Names of page contents."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sksm.fingerprints import fingerprint, of_zeros
from sksm.spans import PAGE_SIZE

pytestmark = [pytest.mark.check, pytest.mark.pure]


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 3), max_size=6))
def test_names_are_those_of_the_reference(seed, fills):
    """Row by row the XXH3-64 digest of the page's bytes, under the seed."""
    rows = np.repeat(np.array(fills, np.uint8)[:, None], PAGE_SIZE, axis=1)
    expected = [xxhash.xxh3_64_intdigest(bytes(row), seed) for row in rows]
    assert fingerprint(rows, seed).tolist() == expected


def test_one_byte_makes_another_name(different):
    """All pages of a batch are named, and none after its neighbour."""
    rows = different(64)
    other = rows.copy()
    other[np.arange(64), np.arange(64) * 63] ^= 1
    assert not (fingerprint(rows, 1) == fingerprint(other, 1)).any()


def test_seed_changes_every_name(different):
    """Who does not know the seed cannot tell the names."""
    rows = different(16)
    assert not (fingerprint(rows, 1) == fingerprint(rows, 2)).any()


def test_name_of_zeros_is_the_name_of_a_zero_page():
    """Known without reading one."""
    zeros = np.zeros((1, PAGE_SIZE), np.uint8)
    assert fingerprint(zeros, 5)[0] == of_zeros(5) != of_zeros(6)
