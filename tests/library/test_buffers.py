"""Where objects keep their bytes: every kind that has some, and those without."""

import array
import ctypes
import gc
import mmap
import types
import weakref

import numpy as np
import pytest

import sksm
from sksm import buffers
from sksm.spans import PAGE_SIZE

pytestmark = pytest.mark.check

SIZE = 3 * PAGE_SIZE


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int32), ("y", ctypes.c_int64))


def anonymous():
    return mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


OBJECTS = {
    "array": lambda: np.arange(SIZE, dtype=np.uint8),
    "C order": lambda: np.ones((3, PAGE_SIZE // 8)),
    "F order": lambda: np.ones((3, PAGE_SIZE // 8), order="F"),
    "transposed": lambda: np.ones((5, 7, 11)).T,
    "0-d": lambda: np.array(1.5),
    "one row of many": lambda: np.ones((4, 100))[2],
    "rows of many": lambda: np.ones((9, 100))[2:5],
    "reversed twice": lambda: np.ones(100)[::-1][::-1],
    "datetime": lambda: np.zeros(100, "datetime64[ns]"),
    "structured": lambda: np.zeros(50, [("a", "<u2"), ("b", "<f8", (3,))]),
    "text": lambda: np.array(["some", "words"]),
    "bool": lambda: np.ones(100, bool),
    "complex": lambda: np.ones(100, complex),
    "big-endian": lambda: np.ones(100, ">i4"),
    "read-only": lambda: np.broadcast_to(np.ones(9), (1, 9)),
    "bytes": lambda: b"x" * SIZE,
    "bytearray": lambda: bytearray(b"x" * SIZE),
    "memoryview": lambda: memoryview(b"x" * SIZE),
    "memoryview cast": lambda: memoryview(bytearray(SIZE)).cast("d"),
    "memoryview in 2-d": lambda: memoryview(bytearray(60)).cast("i", (3, 5)),
    "memoryview slice": lambda: memoryview(b"x" * SIZE)[10:-5],
    "memoryview in F order": lambda: memoryview(np.ones((3, 5), order="F")),
    "memoryview of dates": lambda: memoryview(np.zeros(9, "M8[s]").view("i8")),
    "mmap": anonymous,
    "array.array": lambda: array.array("d", range(100)),
    "ctypes array": ctypes.c_double * 100,
    "ctypes structures": Point * 10,
    "ctypes structure": Point,
}


def exported(obj):
    """Address and size by numpy's or ctypes' own account."""
    if isinstance(obj, np.ndarray):
        return obj.ctypes.data, obj.nbytes
    view = memoryview(obj)
    flat = np.frombuffer(view.cast("B"), "u1") if view.c_contiguous else np.asarray(obj)
    return flat.ctypes.data, view.nbytes


@pytest.mark.parametrize("kind", OBJECTS)
def test_every_object_with_contiguous_memory_is_located(kind):
    """The address and size that numpy or ctypes know."""
    obj = OBJECTS[kind]()
    found = buffers.locate(obj)
    assert (found.address, found.size) == exported(obj)


@pytest.mark.parametrize("kind", OBJECTS)
def test_memory_stays_as_long_as_the_buffer_is_held(kind):
    """What was located is kept, whoever else lets go of it."""
    obj = OBJECTS[kind]()
    before = (obj if isinstance(obj, np.ndarray) else memoryview(obj)).tobytes("A")
    found = buffers.locate(obj)
    del obj
    gc.collect()
    after = ctypes.string_at(found.address, found.size)
    assert after == before


@pytest.mark.parametrize("make", [lambda: bytearray(SIZE), anonymous])
def test_an_object_cannot_change_its_size_meanwhile(make):
    """Its exporter refuses as long as the buffer is held, and no longer."""
    obj = make()
    found = buffers.locate(obj)
    resize = obj.clear if isinstance(obj, bytearray) else obj.close
    with pytest.raises(BufferError):
        resize()
    del found
    resize()


@pytest.mark.parametrize(
    "obj",
    [
        np.ones((4, 6))[:, ::2],
        np.ones(100)[::-1],
        np.ones((4, 6))[:, 1:3],
        np.broadcast_to(np.ones(1), 5),
        memoryview(bytearray(100))[::2],
        memoryview(np.ones((4, 6))[:, ::2]),
    ],
    ids=["columns", "reversed", "inner", "broadcast", "slice", "view of columns"],
)
def test_scattered_memory_is_a_value_error(obj):
    """The message says what to merge instead."""
    with pytest.raises(ValueError, match=r"scattered.*merge"):
        buffers.locate(obj)


@pytest.mark.parametrize(
    "obj",
    [None, 5, "text", [1, 2], {"a": 1}, object(), len],
    ids=lambda obj: type(obj).__name__,
)
def test_an_object_without_a_buffer_is_a_type_error(obj):
    """The message names the object's type and what would do."""
    with pytest.raises(TypeError, match=rf"{type(obj).__name__}.*takes"):
        buffers.locate(obj)


@pytest.mark.parametrize(
    "obj",
    [
        b"",
        bytearray(),
        memoryview(b""),
        np.empty(0),
        np.empty((5, 0, 3)),
        array.array("d"),
        np.zeros(3, "V0"),
    ],
    ids=["bytes", "bytearray", "view", "array", "empty axis", "array.array", "void"],
)
def test_an_object_of_no_bytes_is_a_value_error(obj):
    """Zero length is told, not passed over."""
    with pytest.raises(ValueError, match="no bytes"):
        buffers.locate(obj)


def test_objects_of_python_have_no_pages_to_share():
    """An array of references is memory like any other: the references."""
    found = buffers.locate(np.array([[], {}, None] * 10, dtype=object))
    assert found.size == 30 * 8


# -- whole pages


def test_only_pages_wholly_inside_are_in_the_span():
    """Pages at the edges, shared with others, are counted as partial."""
    memory = np.frombuffer(anonymous(), np.uint8)
    found = buffers.locate(memory[5 : 2 * PAGE_SIZE + 7])
    assert found.span.start == memory.ctypes.data + PAGE_SIZE
    assert (found.span.pages, found.partial_pages) == (1, 2)
    inside_one = buffers.locate(memory[5:50])
    assert (inside_one.span.pages, inside_one.partial_pages) == (0, 1)


def test_first_page_of_a_mapping_of_python_is_kept():
    """It stops `mmap.resize`; of a view that does not begin there, nothing is."""
    whole = anonymous()
    assert buffers.locate(whole).kept_pages == 1
    assert buffers.locate(whole).span.pages == 2
    memory = np.frombuffer(whole, np.uint8)
    for view in (memory, memoryview(memory), memory.reshape(3, -1)[:2]):
        assert buffers.locate(view).kept_pages == 1
    assert buffers.locate(memory[PAGE_SIZE:]).kept_pages == 0


# -- who frees it


def test_holding_a_buffer_keeps_no_owner_longer_than_itself():
    """What ends with the buffer is free at once."""
    base = np.ones(100)
    gone = weakref.ref(base)
    found = buffers.locate(base)
    del base
    assert gone() is not None
    del found
    assert gone() is None


@pytest.fixture
def odd(monkeypatch):
    """An allocator of which nothing is known."""
    for name in ("unsafe", "unsafe_malloc"):
        monkeypatch.setattr(buffers.allocator, name, lambda: "malloc is odd")


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize(
    "kind", ["array", "bytes", "bytearray", "array.array", "memoryview"]
)
def test_memory_of_malloc_is_a_risk_where_the_allocator_is(kind):
    """The reason names the object, the allocator's fault, and what helps."""
    obj = OBJECTS[kind]()
    found = buffers.locate(obj)
    holder = obj.obj if isinstance(obj, memoryview) else obj
    assert type(holder).__name__ in found.risk
    assert "malloc is odd" in found.risk
    assert "sksm.asarray" in found.risk


@pytest.mark.usefixtures("odd")
def test_memory_that_is_unmapped_in_the_end_is_no_risk():
    """A mapping never goes back to malloc."""
    assert buffers.locate(OBJECTS["mmap"]()).risk is None
    assert buffers.locate(sksm.empty(5000)).risk is None


def test_malloc_of_libc_is_no_risk(monkeypatch):
    """Under glibc every kind may merge."""
    for name in ("unsafe", "unsafe_malloc"):
        monkeypatch.setattr(buffers.allocator, name, lambda: None)
    assert all(buffers.locate(make()).risk is None for make in OBJECTS.values())


# -- tensors and Arrow


class Tensor:
    """What torch shows of a tensor, as far as it matters here."""

    def __init__(self, memory, device="cpu"):
        self.memory, self.device = memory, device

    def untyped_storage(self):
        return types.SimpleNamespace(
            device=types.SimpleNamespace(type=self.device),
            nbytes=lambda: self.memory.nbytes,
            data_ptr=lambda: self.memory.ctypes.data,
            memory=self.memory,
        )


def test_a_tensor_is_located_by_its_storage():
    """The whole storage, whatever part the tensor shows."""
    memory = np.ones(1000)
    found = buffers.locate(Tensor(memory))
    assert (found.address, found.size) == (memory.ctypes.data, 8000)


def test_a_tensor_elsewhere_is_a_type_error():
    """Memory of a graphics card is not ours to merge."""
    with pytest.raises(TypeError, match=r"not in this memory"):
        buffers.locate(Tensor(np.ones(5), "cuda"))


def test_an_empty_tensor_is_a_value_error():
    """As for any other object."""
    with pytest.raises(ValueError, match="no bytes"):
        buffers.locate(Tensor(np.ones(0)))


def test_an_arrow_buffer_is_located():
    """By the buffer protocol, like any other."""
    pyarrow = pytest.importorskip("pyarrow")
    buffer = pyarrow.array(range(10_000), pyarrow.int64()).buffers()[1]
    found = buffers.locate(buffer)
    assert (found.address, found.size) == (buffer.address, buffer.size)
