"""The arrays that a model's parameters are made of: in the dtype asked for, where the framework can use them in place.

PyTorch takes any address; XLA and TensorFlow ask for multiples of 64 bytes. The safetensors package starts the data of
a file at any multiple of 8, so that most tensors of the hub lie beside those. Such tensors, and those of another dtype,
are copied by several threads at once; the others stay views on the file's pages. No framework is imported here.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from conversion.checkpoint import Checkpoint
from conversion.slices import read_slice
from conversion.stored import DTYPES, map_memory
from opt_core.errors import CheckpointError, raise_if

_ALIGNMENT = 64  # bytes, of the copies
_BUFFER_BYTES = 1 << 28
_CHUNK_ELEMENTS = 1 << 20
_MAX_THREADS = 8  # which share the bandwidth of the memory


def read_parameters(
    checkpoint: Checkpoint,
    names: Iterable[str],
    dtype: str,
    *,
    alignment: int = 1,
    slices: Mapping[str, tuple[slice, ...]] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) for the schema's `names`, in any order, in `dtype`.

    Arrays are as those of `Checkpoint.read`. The copies among them share buffers of about 256 MB; a buffer is freed
    with the last of its arrays.

    Args:
        alignment: at most 64; addresses are multiples of it, in bytes.
        slices: of the weights that are wanted in part, the part of each, as `conversion.slices.read_slice` has it.

    Raises:
        CheckpointError: finite values that `dtype` cannot hold, with the name of each such weight.
    """

    def read(name: str) -> np.ndarray:
        return read_slice(checkpoint, name, slices[name]) if slices and name in slices else checkpoint.read(name)

    waiting: dict[str, np.ndarray] = {}
    names = tuple(names)

    def copies() -> Iterator[tuple[str, np.ndarray]]:
        copied, overflowed = _copies(list(waiting.values()), DTYPES[dtype])
        if overflowed:  # rare, so everything is looked at again, for one error with all of it
            raise_if(CheckpointError, checkpoint.source, _overflows(read, names, DTYPES[dtype]))
        done = zip(list(waiting), copied, strict=True)
        waiting.clear()
        checkpoint.close()  # with which the pages that were copied leave the memory
        yield from done

    for name in names:
        array = read(name)
        if array.dtype == DTYPES[dtype] and array.ctypes.data % alignment == 0:
            yield name, array
            continue
        waiting[name] = array
        if sum(array.nbytes for array in waiting.values()) >= _BUFFER_BYTES:
            yield from copies()
    if waiting:
        yield from copies()


def _copies(arrays: Sequence[np.ndarray], dtype: np.dtype) -> tuple[list[np.ndarray], bool]:
    """The arrays in `dtype`, in one buffer; and whether infinities are among them that may come of overflow."""
    copies = _empty_arrays([array.shape for array in arrays], dtype)
    chunks = [chunk for pair in zip(copies, arrays, strict=True) for chunk in _chunks(*pair)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS)) as threads:
        return copies, any(list(threads.map(_copy, chunks)))  # raises what a thread raised


def _empty_arrays(shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> list[np.ndarray]:
    """Arrays of zeros in one buffer, each at a multiple of 64 bytes."""
    counts = [math.prod(shape) for shape in shapes]
    starts = [0]
    for count in counts:
        size = count * dtype.itemsize
        starts.append(starts[-1] + size + -size % _ALIGNMENT)
    buffer = map_memory(starts.pop())
    parts = zip(shapes, counts, starts, strict=True)
    return [np.frombuffer(buffer, dtype, count, start).reshape(shape) for shape, count, start in parts]


def _chunks(target: np.ndarray, source: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Matching pieces of two row-major arrays."""
    target, source = target.reshape(-1), source.reshape(-1)
    for start in range(0, target.size, _CHUNK_ELEMENTS):
        yield target[start : start + _CHUNK_ELEMENTS], source[start : start + _CHUNK_ELEMENTS]


def _copy(chunk: tuple[np.ndarray, np.ndarray]) -> bool:
    """Copies a piece; True where a float16 copy holds infinities, be they stored ones or overflow."""
    target, source = chunk
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(target, source, casting="unsafe")
    return target.dtype == np.float16 != source.dtype and bool(np.isinf(target).any())


def _overflows(read: Callable[[str], np.ndarray], names: Iterable[str], dtype: np.dtype) -> Iterator[str]:
    for name in names:
        array = read(name)
        with np.errstate(over="ignore", invalid="ignore"):
            overflowed = np.isinf(array.astype(dtype)) & np.isfinite(array)
        if overflowed.any():
            largest = np.abs(array[overflowed].astype(np.float64)).max()
            yield f"{name}: expected values within the range of {dtype.name}, got {largest:.6g}"
