"""Which malloc serves this process, and what that means for merged memory."""

import ctypes

import pytest

from sksm.process import allocator

pytestmark = pytest.mark.check


def test_glibc_is_recognised_wherever_its_malloc_seems_to_be(monkeypatch):
    """Its address may be that of a stub in the executable."""
    monkeypatch.setattr(allocator.libc, "address_of", lambda name: 1)
    assert allocator.unsafe() is None


def test_an_allocator_that_glibc_does_not_know_is_named(monkeypatch):
    """By the file in which its malloc is."""
    monkeypatch.setattr(allocator, "_glibc_serves", lambda: False)
    allocator.unsafe_malloc.cache_clear()
    assert "what the allocator in /" in allocator.unsafe()
    allocator.unsafe_malloc.cache_clear()


def test_jemalloc_is_refused_wherever_it_is_loaded(monkeypatch):
    """Even beside glibc: what it gives out ends up in objects, too."""
    real = allocator.maps.every_mapping("self")
    path = "/usr/lib/libjemalloc.so.2"
    fake = [*real, type(real[0])(real[0].span, 5, False, 0, "00:00", 1, path)]
    monkeypatch.setattr(allocator.maps, "every_mapping", lambda pid: fake)
    assert allocator.unsafe().startswith("jemalloc")


@pytest.mark.parametrize("failure", [OSError, AttributeError])
def test_a_libc_without_an_account_is_not_taken_for_glibc(monkeypatch, failure):
    """musl has no libc.so.6, glibc before 2.33 no mallinfo2."""

    class Lacking:
        def __init__(self, name):
            raise failure(name)

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", Lacking)
        assert not allocator._glibc_serves()


def test_asking_leaks_nothing():
    """The block that was tried is given back: no mapping is left."""
    before = len(allocator.maps.every_mapping("self"))
    for _ in range(50):
        assert allocator._glibc_serves()
    assert len(allocator.maps.every_mapping("self")) < before + 20
