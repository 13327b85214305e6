"""The folder that Orbax saves: a JSON description of the tree, and one Zarr array for each leaf.

Reads a checkpoint in either form that Orbax writes (an OCDBT database, or a folder for each leaf; Zarr 2 or 3) and
writes the first with Zarr 2, through TensorStore alone: neither orbax nor jax is needed. Stored names are the keys on
the way to a leaf, joined by ".". The description is the business of `orbax_tree`, where bytes lie of `chunk_store`,
what an array is of `zarr_array`; models are nobody's here. Source: Orbax 0.12.8 and what its `StandardCheckpointer`
writes.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from conversion.orbax.chunk_store import ChunkStore, ocdbt_spec, open_store
from conversion.orbax.ocdbt import MANIFEST, import_tensorstore
from conversion.orbax.orbax_tree import (
    METADATA,
    Description,
    Leaf,
    find_checkpoint,
    name_of,
    name_problems,
    read_description,
    reason_to_skip,
    write_description,
)
from conversion.orbax.zarr_array import ZarrArray, check_chunk, chunks_problem, read_metadata
from conversion.safetensors_file import PlannedTensor
from conversion.stored import DTYPES, StoredTensor
from opt_core.errors import CheckpointError, raise_if

_CONFIG = {"max_inline_value_bytes": 1024, "compression": {"id": "zstd"}}  # of the database, as in Orbax
_CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False}  # whoever publishes a folder syncs it
MAX_CHUNK_BYTES = 1 << 26  # of written arrays


class OrbaxFolder:
    """A checkpoint of Orbax, as a table of arrays: a `TensorFile`.

    Attributes:
        path: the folder that holds `_METADATA`.
        tensors: by stored name; the offsets are but numbers, since an array lies in several places.
        skipped: the stored names of leaves that are no weights, each with the reason.
    """

    def __init__(self, store: ChunkStore, arrays: dict[str, tuple[str, ZarrArray]], skipped: dict[str, str]):
        self.path, self.skipped = store.folder, skipped
        self.tensors = {
            name: StoredTensor(array.dtype, array.shape, number)
            for number, (name, (_, array)) in enumerate(arrays.items())
        }
        self._store, self._arrays = store, arrays

    def read(self, name: str) -> np.ndarray:
        """The array of one tensor: writable, row-major, a copy.

        Raises:
            CheckpointError: what is stored is no float, damaged, or not as much as the metadata says.
        """
        key, array = self._arrays[name]
        if array.dtype not in DTYPES:
            text = f"{name}: expected a dtype of {', '.join(DTYPES)}, got {array.dtype}"
            raise CheckpointError(str(self.path), [text])
        try:
            for chunk in array.chunk_keys():
                check_chunk(self._store, f"{key}/{chunk}", array)
            return _decode(self._store, key, array)
        except Exception as error:  # TensorStore raises what it finds as one of half a dozen types
            raise CheckpointError(str(self.path), [f"{name}: damaged: {str(error)[:300]}"]) from None

    def view(self, name: str) -> np.ndarray:
        return self.read(name)

    def close(self) -> None:
        """Nothing to do: no file stays open after a read."""


def _decode(store: ChunkStore, key: str, array: ZarrArray) -> np.ndarray:
    tensorstore = import_tensorstore()
    spec = {
        "driver": "zarr" if array.version == 2 else "zarr3",
        "kvstore": store.spec(f"{key}/"),
        "fill_missing_data_reads": False,
    }
    stored = tensorstore.open(spec, open=True, read=True, context=tensorstore.Context(_CONTEXT)).result()
    if (stored.shape, stored.dtype.name) != (array.shape, array.dtype):
        raise ValueError(f"expected {array.dtype} {array.shape}, got {stored.dtype.name} {stored.shape}")
    return np.require(stored.read(order="C").result(), DTYPES[array.dtype], ["C", "W"])


def open_folder(path: Path) -> OrbaxFolder:
    """Finds the arrays of a checkpoint; reads none.

    `path` is the folder of a checkpoint (with `_METADATA`), a step that CheckpointManager wrote (its item `default`, or
    its only one), or a folder of steps: then the finished step with the highest number, unless two have that number.
    What Orbax calls temporary is never read.

    Of the leaves, weights are those under a top-level key `params` where there is one, else all but `opt_state`,
    `step`, `rng` and `rngs`. Scalars, keys of random numbers (uint32), texts and empty nodes are no weights. A last key
    `value`, which `nnx.State` adds, is not part of a name.

    Raises:
        CheckpointError: lists what is missing, unfinished, damaged, larger than its bytes, or not as Orbax writes it.
        MissingFrameworkError: tensorstore is not installed.
    """
    folder = find_checkpoint(path)
    import_tensorstore()
    description = read_description(folder)
    store = open_store(folder)
    if description.is_ocdbt not in (None, store.is_ocdbt):
        expected = "with" if description.is_ocdbt else "without"
        raise CheckpointError(str(folder), [f"{METADATA}: expected a folder {expected} {MANIFEST}, got the other form"])
    arrays, skipped, problems = _find_arrays(store, description)
    raise_if(CheckpointError, str(folder), problems)
    return OrbaxFolder(store, arrays, skipped)


def _find_arrays(
    store: ChunkStore, description: Description
) -> tuple[dict[str, tuple[str, ZarrArray]], dict[str, str], list[str]]:
    """By name the key and the metadata of each array; what is skipped and why; and what is wrong."""
    arrays: dict[str, tuple[str, ZarrArray]] = {}
    skipped: dict[str, str] = {}
    problems: list[str] = []
    has_params = description.has_params
    for leaf in description.leaves:
        try:
            array = None if (reason := reason_to_skip(leaf, has_params)) else _read_array(store, leaf, description)
        except ValueError as error:
            problems.append(f"{leaf.stored}: {error}")
            continue
        if array is None or (reason := _reason_to_skip_array(array)):
            skipped[leaf.stored] = str(reason)
        elif name_of(leaf) in arrays:
            problems.append(f"{leaf.stored}: a second leaf of this name")
        else:
            arrays[name_of(leaf)] = leaf.stored, array
    return arrays, skipped, problems


def _read_array(store: ChunkStore, leaf: Leaf, description: Description) -> ZarrArray:
    """The metadata of one array; ValueError where its leaf, its shape and its chunks do not agree."""
    array = read_metadata(store, leaf.stored, description.zarr_version)
    saved = array.shape if leaf.saved_shape is None else leaf.saved_shape
    if len(saved) != len(array.shape) or any(
        not step <= part <= size for step, part, size in zip(array.chunk, saved, array.shape, strict=True)
    ):
        raise ValueError(f"{METADATA} says {saved}, the array {array.shape} in chunks of {array.chunk}")
    if array.dtype in DTYPES and (problem := chunks_problem(store, leaf.stored, array)):
        raise ValueError(problem)
    return array


def _reason_to_skip_array(array: ZarrArray) -> str | None:
    if not array.shape:
        return "a scalar"
    return "a key of random numbers" if array.dtype in ("<u4", "uint32") else None


# -- writing ----------------------------------------------------------------------------------------------------------


def write_folder(
    folder: Path, tensors: Iterable[PlannedTensor], write_tensor: Callable[[IO[bytes], PlannedTensor], None]
) -> None:
    """Writes a checkpoint into an empty folder, calling `write_tensor(file, tensor)` for each of `tensors`.

    `write_tensor` must write exactly `tensor.nbytes` bytes. The tree is one of dicts, cut at the dots of the names. One
    chunk is in memory at a time, of 64 MB at most; nothing is compressed, since weights hardly can be. Files are not
    synced. Leaves are said to be NumPy's, so that Orbax restores them on any device: `jax.Array` binds a checkpoint to
    the devices that saved it, unless a target is given.

    Raises:
        CheckpointError: a name that is also the beginning of another, or has an empty part.
        OSError: TensorStore could not write; the text is its own.
        MissingFrameworkError: tensorstore is not installed.
    """
    tensors = list(tensors)
    raise_if(CheckpointError, str(folder), name_problems(tensors))
    started = time.time_ns()
    with _UnderWay() as under_way:
        for tensor, array in zip(tensors, _create_arrays(folder, tensors), strict=True):
            chunks = _Chunks(tensor, array, under_way)
            write_tensor(cast(IO[bytes], chunks), tensor)
            assert chunks.written == tensor.nbytes, tensor.name
        under_way.wait()
    write_description(folder, tensors, started)


def _create_arrays(folder: Path, tensors: list[PlannedTensor]) -> list[Any]:
    """The empty arrays in a new database, all of them in one commit."""
    tensorstore = import_tensorstore()
    context, transaction = tensorstore.Context(_CONTEXT), tensorstore.Transaction()
    opened = [
        tensorstore.open(_spec_to_write(folder, tensor), create=True, context=context, transaction=transaction)
        for tensor in tensors
    ]
    arrays = [array.result() for array in opened]
    _wait_for([transaction.commit_async()])
    return [array.with_transaction(None) for array in arrays]


def _spec_to_write(folder: Path, tensor: PlannedTensor) -> dict[str, Any]:
    dtype = DTYPES[tensor.dtype]
    metadata = {
        "shape": tensor.shape,
        "chunks": (_chunk_rows(tensor), *tensor.shape[1:]),
        "dtype": "bfloat16" if tensor.dtype == "bfloat16" else dtype.str,
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "order": "C",
    }
    kvstore = {**ocdbt_spec(folder, f"{tensor.name}/"), "config": _CONFIG}
    return {"driver": "zarr", "kvstore": kvstore, "metadata": metadata, "store_data_equal_to_fill_value": True}


def _chunk_rows(tensor: PlannedTensor) -> int:
    """Rows of a chunk: as few chunks of about equal size as the bound allows."""
    rows = tensor.shape[0]
    count = -(-tensor.nbytes // MAX_CHUNK_BYTES)
    return -(-rows // min(count, rows))


def _wait_for(futures: list[Any]) -> None:
    """Waits for all, whatever becomes of one: a folder that is still written to cannot be deleted."""
    if errors := [error for future in futures if (error := future.exception()) is not None]:
        raise OSError(f"TensorStore could not write: {str(errors[0])[:500]}") from errors[0]


class _UnderWay:
    """Chunks that TensorStore is storing: small ones go together into one file and one commit.

    A context manager that leaves none behind, even after an error elsewhere.
    """

    def __init__(self) -> None:
        self._futures: list[Any] = []
        self._bytes = 0

    def add(self, future, nbytes: int) -> None:
        self._futures.append(future)
        self._bytes += nbytes
        if self._bytes >= MAX_CHUNK_BYTES // 2:
            self.wait()

    def wait(self) -> None:
        futures, self._futures, self._bytes = self._futures, [], 0
        _wait_for(futures)

    def __enter__(self) -> "_UnderWay":
        return self

    def __exit__(self, *exception) -> None:
        for future in self._futures:
            future.exception()


class _Chunks:
    """A file for the bytes of one array, which stores them chunk by chunk."""

    def __init__(self, tensor: PlannedTensor, array, under_way: _UnderWay):
        self._tensor, self._array, self._under_way = tensor, array, under_way
        rows, total = _chunk_rows(tensor), tensor.shape[0]
        self._stops = iter([*range(rows, total, rows), total])
        self._start = self._filled = self.written = 0
        self._row_bytes = tensor.nbytes // total
        self._begin()

    def _begin(self) -> None:
        self._stop = next(self._stops, self._start)
        self._buffer = np.empty((self._stop - self._start) * self._row_bytes, np.uint8)
        self._filled = 0

    def write(self, data) -> int:
        data = np.frombuffer(data, np.uint8)
        start = 0
        while start < data.size:
            step = min(self._buffer.size - self._filled, data.size - start)
            assert step, f"{self._tensor.name}: more bytes than it has"
            self._buffer[self._filled : self._filled + step] = data[start : start + step]
            start, self._filled, self.written = start + step, self._filled + step, self.written + step
            if self._filled == self._buffer.size:
                self._store()
        return data.size

    def _store(self) -> None:
        rows = self._buffer.view(DTYPES[self._tensor.dtype]).reshape(-1, *self._tensor.shape[1:])
        stored = self._array[self._start : self._stop].write(rows, can_reference_source_data_indefinitely=True)
        self._under_way.add(stored, rows.nbytes)
        self._start = self._stop
        self._begin()
