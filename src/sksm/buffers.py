"""Where an object keeps its bytes, and what happens when it is freed."""

from __future__ import annotations

import dataclasses
import mmap
from typing import Any

import numpy as np

from sksm.process import allocator
from sksm.spans import PAGE_SIZE, Span, whole_pages

# mmap.resize has the kernel move and grow one mapping, which would show what
# follows in the pool; of two mappings it refuses to. So no part of an mmap that
# begins where it does may be one merged mapping, even after it was shrunk.
FIRST_PAGE = "first page of an mmap that may be resized"
PARTLY_OUTSIDE = "page partly outside the object"


class Pages(mmap.mmap):
    """Memory of an array that we made: nobody else gives advice about it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Buffer:
    """Contiguous memory of an object, kept mapped as long as this lives.

    `risk` says why the memory must not be merged: what it goes back to when it is
    freed may count on zeros. None for memory that is unmapped in the end.
    """

    address: int
    size: int
    export: object  # holds the memory: exporters refuse to resize or close
    risk: str | None = None
    kept_page: int | None = None  # address of a page that must stay as it is
    never_drops: bool = False  # see `AddressSpace`

    @property
    def span(self) -> Span:
        """The pages that lie wholly inside and may be merged."""
        span = whole_pages(self.address, self.size)
        return Span(span.start + self.kept_pages * PAGE_SIZE, span.stop)

    @property
    def kept_pages(self) -> int:
        """How many pages at the start must stay as they are: one or none."""
        span = whole_pages(self.address, self.size)
        return int(span.pages > 0 and span.start == self.kept_page)

    @property
    def partial_pages(self) -> int:
        """How many pages are touched but not covered."""
        first = self.address // PAGE_SIZE
        stop = -(-(self.address + self.size) // PAGE_SIZE)
        return stop - first - whole_pages(self.address, self.size).pages


def locate(obj: object) -> Buffer:
    """Find the memory of an array, buffer or tensor.

    Raises:
        TypeError: it has no memory to speak of, or not in this process.
        ValueError: its memory is scattered, or there is none of it.
    """
    if hasattr(obj, "untyped_storage"):
        return _of_tensor(obj)
    array = obj if isinstance(obj, np.ndarray) else _as_array(obj)
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise ValueError(
            "the memory of this view is scattered: merge the array it is a view of "
            "(.base), or a contiguous copy (sksm.asarray)"
        )
    if not array.nbytes:
        raise ValueError("nothing to merge: the object has no bytes")
    return _of_array(array)


def _as_array(obj: object) -> np.ndarray[Any, Any]:
    try:
        view = memoryview(obj)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{type(obj).__name__} has no buffer: merge takes arrays, bytes, "
            "bytearray, memoryview, mmap, Arrow buffers and tensors"
        ) from None
    if not view.contiguous:
        raise ValueError(
            "the memory of this view is scattered: merge the object it views, "
            "or a contiguous copy"
        )
    if not view.nbytes:
        raise ValueError("nothing to merge: the object has no bytes")
    if view.c_contiguous:
        return np.frombuffer(view.cast("B"), np.uint8)
    return np.asarray(view)


def _of_array(array: np.ndarray[Any, Any]) -> Buffer:
    where = (array.ctypes.data, array.nbytes, array)
    owner: Any = array
    while True:
        if isinstance(owner, np.ndarray) and owner.base is not None:
            owner = owner.base
        elif isinstance(owner, memoryview):
            owner = owner.obj
        else:
            break
    if isinstance(owner, mmap.mmap):
        whole = np.frombuffer(owner, np.uint8)
        ours = isinstance(owner, Pages)
        return Buffer(*where, kept_page=whole.ctypes.data, never_drops=ours)
    if isinstance(owner, np.ndarray) and owner.flags.owndata:
        risk = _told(owner, allocator.unsafe_malloc())
        return Buffer(*where, risk=risk, never_drops=True)
    return Buffer(*where, risk=_told(owner, allocator.unsafe()))


def _of_tensor(tensor: Any) -> Buffer:
    storage = tensor.untyped_storage()
    if storage.device.type != "cpu":
        raise TypeError(f"the tensor lives on {storage.device}, not in this memory")
    if not storage.nbytes():
        raise ValueError("nothing to merge: the tensor has no bytes")
    return Buffer(
        storage.data_ptr(),
        storage.nbytes(),
        storage,
        risk=_told(tensor, allocator.unsafe()),
    )


def _told(owner: object, reason: str | None) -> str | None:
    """Say which memory must not be merged because of an allocator, and what helps."""
    if reason is None:
        return None
    kind = type(owner).__name__
    return f"memory of this {kind} is malloc's: {reason} (sksm.asarray makes a copy)"
