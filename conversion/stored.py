"""Where one tensor lies in a file, and its bytes as an array: a view on a private memory map, or else a copy.

Containers (`safetensors_file`, `torch_zip`) turn a file into a table of `StoredTensor` without reading weights; what
touches the bytes of weights for reading is here. Nothing here knows names or models.
"""

import math
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from opt_core.errors import CheckpointError

DTYPES = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# Without a reservation, Linux maps files larger than its memory; Python names the flag from 3.13 on.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class StoredTensor(NamedTuple):
    """One tensor of one file. Two of them that are equal are the same bytes."""

    dtype: str  # a key of DTYPES, or the container's own word for what is not read
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    strides: tuple[int, ...] | None = None  # in elements; None: row-major without gaps

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class TensorFile(Protocol):
    """What a container makes of its files: a table of tensors, and their values one by one."""

    path: Path
    tensors: dict[str, StoredTensor]

    def read(self, name: str) -> np.ndarray:
        """The array of one tensor, row-major and writable; writing to it never reaches the file."""
        ...

    def view(self, name: str) -> np.ndarray:
        """The same values before any is read, of any strides and alignment: on a `FileMap`, or else a copy."""
        ...

    def close(self) -> None: ...


class FileMap(mmap.mmap):
    """A file, mapped privately, that knows which one it is."""

    path: Path
    identity: tuple[int, ...]

    @property
    def address(self) -> int:
        return np.frombuffer(self, np.uint8).ctypes.data


class MappedFile:
    """A file of weights, mapped privately on the first read: writing to an array never reaches the file.

    Arrays stay valid after `close`, since each keeps the map alive.
    """

    def __init__(self, path: Path, tensors: dict[str, StoredTensor]):
        self.path = path
        self.tensors = tensors
        self._map: FileMap | None = None
        self._identity: tuple[int, ...] | None = None

    def read(self, name: str) -> np.ndarray:
        """The array of one tensor, writable, row-major; a view wherever its bytes lie in one aligned run."""
        array = self.view(name)
        return array if array.flags.c_contiguous and array.flags.aligned else array.copy(order="C")

    def view(self, name: str) -> np.ndarray:
        """The same values before any is read, of any strides and alignment."""
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                str(self.path), [f"{name}: expected a dtype of {', '.join(DTYPES)}, got {tensor.dtype}"]
            )
        dtype, count = DTYPES[tensor.dtype], _elements_spanned(tensor)
        flat = np.frombuffer(self._mapped(), dtype, count, tensor.offset)
        if tensor.strides is not None:
            strides = [stride * dtype.itemsize for stride in tensor.strides]
            flat = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)
        return flat.reshape(tensor.shape)

    def close(self) -> None:
        self._map = None

    def _mapped(self) -> FileMap:
        if self._map is None:
            with open(self.path, "rb") as file:
                self._identity = check_identity(file.fileno(), self._identity, self.path)
                self._map = _map_privately(file.fileno())
                self._map.path, self._map.identity = self.path, self._identity
        return self._map


def check_identity(descriptor: int, expected: tuple[int, ...] | None, path: Path) -> tuple[int, ...]:
    """What tells an open file from one that takes its name later, and from itself once it is written to.

    Raises:
        CheckpointError: it is not what was expected.
    """
    status = os.fstat(descriptor)
    identity = status.st_dev, status.st_ino, status.st_mtime_ns
    if expected not in (None, identity):
        raise CheckpointError(str(path), ["it was written to or replaced since it was opened"])
    return identity


def _map_privately(descriptor: int) -> FileMap:
    if hasattr(mmap, "MAP_PRIVATE"):
        flags, access = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return FileMap(descriptor, 0, flags=flags, prot=access)
    return FileMap(descriptor, 0, access=mmap.ACCESS_COPY)  # Windows


def map_memory(nbytes: int) -> mmap.mmap:
    """Anonymous memory in pages of the system's choice.

    NumPy's own would ask Linux for large pages. They take 0.1 s for 500 MB at best, small ones 0.2 s; but in a virtual
    machine whose host takes free memory back it is the large pages that are gone, and getting them again took 1.1 s.
    """
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)  # Windows


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of an array without gaps."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _elements_spanned(tensor: StoredTensor) -> int:
    if tensor.strides is None:
        return math.prod(tensor.shape)
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
