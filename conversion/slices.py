"""Parts of tensors, for devices that hold no more than theirs: no byte but the part's own is asked of a file.

Parts are read from the file, run by run, into memory of their own: some rows of a matrix are one run, some columns one
for each row. Views on the file's map, which whole tensors are, would bring more into memory. Between columns are the
others, and around rows Linux maps what it has at hand, 2 MB at most on either side: for opt-1.3b cut in four that was
255 MB a process beyond its 665 (Linux 6.18). Formats that do not keep a tensor in one piece give it whole, and it
is cut. Which device holds what is `opt_core.sharding`'s business.
"""

from collections.abc import Sequence
from io import FileIO
from typing import TYPE_CHECKING

import numpy as np

from conversion.stored import FileMap, check_identity, map_memory
from opt_core.errors import CheckpointError, InputError, raise_if

if TYPE_CHECKING:
    from conversion.checkpoint import Checkpoint


def read_slice(checkpoint: "Checkpoint", name: str, index: Sequence[slice]) -> np.ndarray:
    """A part of one tensor by the schema's name: row-major, writable, in the stored dtype.

    `checkpoint.bytes_read` grows by what is asked of the files. Writing to the part never reaches them.

    Args:
        index: a slice for each dimension, with a step of 1 and within the tensor.

    Raises:
        InputError: an index that does not fit the tensor.
        CheckpointError: the file was written to, or another has taken its name, since it was opened.
    """
    index, parts, start = _checked(name, index, checkpoint.shapes[name]), [], 0
    pieces, dim = checkpoint.views(name)
    for piece in pieces:
        low, high = (min(max(0, end - start), piece.shape[dim]) for end in (index[dim].start, index[dim].stop))
        start += piece.shape[dim]
        if low < high:
            part = read_part(piece, (*index[:dim], slice(low, high), *index[dim + 1 :]))
            checkpoint.bytes_read += (piece if map_of(piece) is None else part).nbytes
            parts.append(part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts, dim)


def read_part(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """A part of an array that may be a view on a file's map, unread: row-major and writable.

    Anything less than the whole has memory of its own, so that nothing keeps the rest.

    Raises:
        CheckpointError: as `read_slice`.
    """
    part, mapped = array[index], map_of(array)
    if part.size == array.size and part.flags.c_contiguous and part.flags.aligned:
        return part
    if mapped is None:
        return part.copy(order="C")
    order = sorted(range(part.ndim), key=lambda dim: -part.strides[dim])
    stored = part.transpose(order)
    if stored.strides[-1] != part.itemsize:  # single numbers, each with a gap behind it: no format of today
        return part.copy(order="C")
    return np.ascontiguousarray(_read_runs(stored, mapped).transpose(np.argsort(order)))


def _checked(name: str, index: Sequence[slice], shape: tuple[int, ...]) -> tuple[slice, ...]:
    if len(index) != len(shape):
        raise InputError(name, [f"index: expected {len(shape)} slices, got {len(index)}"])
    ends = [
        (0 if it.start is None else it.start, length if it.stop is None else it.stop)
        for it, length in zip(index, shape, strict=True)
    ]
    problems = [
        f"dim {dim}: expected a slice within 0 and {length} by steps of 1, got {index[dim]}"
        for dim, ((start, stop), length) in enumerate(zip(ends, shape, strict=True))
        if not 0 <= start < stop <= length or index[dim].step not in (None, 1)
    ]
    raise_if(InputError, name, problems)
    return tuple(slice(*pair) for pair in ends)


def map_of(array) -> FileMap | None:
    """The map that a view lies on."""
    while array is not None and not isinstance(array, FileMap):
        array = array.obj if isinstance(array, memoryview) else getattr(array, "base", None)
    return array


def _read_runs(stored: np.ndarray, mapped: FileMap) -> np.ndarray:
    """The values of a view whose strides fall, read from the file itself."""
    starts, run_bytes = _runs(stored)
    first = stored.ctypes.data - mapped.address
    memory = map_memory(stored.nbytes)
    targets = memoryview(memory)
    with open(mapped.path, "rb", buffering=0) as file:
        check_identity(file.fileno(), mapped.identity, mapped.path)
        for target, start in zip(range(0, stored.nbytes, run_bytes), starts, strict=True):
            file.seek(first + start)
            _fill(file, targets[target : target + run_bytes])
    return np.frombuffer(memory, stored.dtype).reshape(stored.shape)


def _runs(stored: np.ndarray) -> tuple[list[int], int]:
    """Where each run without gaps begins, in bytes behind the first number, and the bytes of every run."""
    dims, run_bytes = stored.ndim, stored.itemsize
    while dims and stored.strides[dims - 1] == run_bytes:
        dims -= 1
        run_bytes *= stored.shape[dims]
    starts = np.zeros(1, np.int64)
    for length, stride in zip(stored.shape[:dims], stored.strides[:dims], strict=True):
        starts = np.add.outer(starts, np.arange(length) * stride).reshape(-1)
    return starts.tolist(), run_bytes


def _fill(file: FileIO, target: memoryview) -> None:
    while target:
        count = file.readinto(target)  # Linux gives at most 2 GB at once
        if not count:
            raise CheckpointError(str(file.name), [f"truncated: expected {len(target)} bytes at byte {file.tell()}"])
        target = target[count:]
