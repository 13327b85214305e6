"""HDF5 itself: which datasets a file has, their bytes, and the making of files whose values are written later.

What lies in one run of the file is mapped, and only chunked or compressed datasets are read through h5py. Links that
leave the file, external and virtual data, and datasets that are larger than what is stored are refused. How Keras names
weights in such files is the business of `h5_file` (Keras 2) and `keras_h5` (Keras 3).
Source: the HDF5 1.14 library reference; the rules are stricter than those of Keras 3.15's `saving_lib`.
"""

import contextlib
import io
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from conversion.safetensors_file import PlannedTensor
from conversion.stored import DTYPES, MappedFile, StoredTensor
from opt_core.errors import CheckpointError, raise_if

MAX_OBJECTS = 1 << 15  # four times what OPT's largest has, with every group and the state of an optimizer
_MAX_DEPTH = 16
_MAX_COMPRESSION = 1000  # bytes declared for one stored; deflate reaches 1032
_GZIP, _SHUFFLE = 1, 2  # HDF5's numbers of filters
_ALIGNMENT = 64

# From an open file and the paths of its datasets to the names of those that are weights; raises CheckpointError.
NamesOf = Callable[[Any, list[str]], dict[str, str]]


class Part(NamedTuple):
    """The bytes of a larger file that are HDF5, such as a member of an archive."""

    start: int
    length: int


class H5File(MappedFile):
    """A mapped file, some of whose tensors only h5py can read."""

    def __init__(self, path: Path, tensors: dict[str, StoredTensor], packed: dict[str, str], part: Part | None = None):
        super().__init__(path, tensors)
        self._packed, self._part = packed, part  # `packed` is name to dataset

    def view(self, name: str) -> np.ndarray:
        """As `MappedFile.view`; of a chunked or compressed dataset a copy."""
        if name not in self._packed:
            return super().view(name)
        try:
            with _opened(self.path, self._part) as file:
                return _unpacked(file[self._packed[name]]).view(DTYPES[self.tensors[name].dtype])
        except Exception as error:  # h5py raises what HDF5 reports as one of half a dozen types
            raise CheckpointError(str(self.path), [f"{name}: damaged: {str(error)[:200]}"]) from None


def open_datasets(path: Path, names_of: NamesOf, part: Part | None = None) -> H5File:
    """Finds the datasets of any HDF5 file; reads none.

    Args:
        names_of: which datasets are weights, and their names.
        part: where in the file HDF5 begins and ends; None: all of it.

    Raises:
        CheckpointError: lists every link and dataset that is not what a checkpoint may hold.
    """
    try:
        with _opened(path, part) as file:
            return _open(file, path, names_of, part)
    except CheckpointError as error:
        raise CheckpointError(str(path), error.problems) from None
    except Exception as error:  # as above
        text = f"expected HDF5 as Keras writes it, got a damaged or another file: {str(error)[:200]}"
        raise CheckpointError(str(path), [text]) from None


@contextlib.contextmanager
def _opened(path: Path, part: Part | None) -> Iterator[Any]:
    import h5py

    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_PartOfFile(path, part)) if part else path
        yield stack.enter_context(h5py.File(source, "r"))


class _PartOfFile(io.RawIOBase):
    """Some bytes of a file, as a file to read."""

    def __init__(self, path: Path, part: Part):
        self._file, self._part, self._at = open(path, "rb"), part, 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._part.length}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        self._file.seek(self._part.start + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._part.length - self._at)])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _unpacked(dataset) -> np.ndarray:
    """The values, chunk by chunk: HDF5 itself would follow a gzip stream as far as it goes, whatever was declared."""
    if dataset.chunks is None:
        return dataset[()]
    array, filters = np.empty(dataset.shape, dataset.dtype), _filters(dataset)
    for window in dataset.iter_chunks():
        skipped, data = dataset.id.read_direct_chunk(tuple(along.start for along in window))
        used = [number for place, number in enumerate(filters) if not skipped >> place & 1]
        chunk = _unpacked_chunk(data, used, math.prod(dataset.chunks) * dataset.dtype.itemsize, dataset.dtype)
        array[window] = chunk.reshape(dataset.chunks)[tuple(slice(along.stop - along.start) for along in window)]
    return array


def _unpacked_chunk(data: bytes, filters: list[int], nbytes: int, dtype: np.dtype) -> np.ndarray:
    if _GZIP in filters:
        stream = zlib.decompressobj()
        data = stream.decompress(data, nbytes + 1)
    if len(data) != nbytes:
        raise ValueError(f"expected a chunk of {nbytes} bytes, got {len(data)} or more")
    array = np.frombuffer(data, np.uint8)
    if _SHUFFLE in filters:  # first bytes of all numbers, then second ones, ...
        array = np.ascontiguousarray(array.reshape(dtype.itemsize, -1).T).reshape(-1)
    return array.view(dtype)


def _filters(dataset) -> list[int]:
    settings = dataset.id.get_create_plist()
    return [settings.get_filter(place)[0] for place in range(settings.get_nfilters())]


def _open(file, path: Path, names_of: NamesOf, part: Part | None) -> H5File:
    if file.userblock_size:
        raise CheckpointError(str(path), [f"expected no user block, got one of {file.userblock_size} bytes"])
    datasets, problems = _walk(file)
    raise_if(CheckpointError, str(path), problems)
    start, length = part or (0, path.stat().st_size)
    tensors, packed = {}, {}
    for location, name in names_of(file, list(datasets)).items():
        dataset = datasets[location]
        problem = _dataset_problem(dataset, length)
        if problem:
            problems.append(f"{location}: {problem}")
            continue
        offset = dataset.id.get_offset()
        tensors[name] = StoredTensor(_dtype_name(dataset), dataset.shape, start + (offset or 0))
        if offset is None:
            packed[name] = location
    raise_if(CheckpointError, str(path), problems)
    return H5File(path, tensors, packed, part)


def _walk(file) -> tuple[dict[str, Any], list[str]]:
    """Every dataset by its path, reached over hard links only, each once."""
    import h5py

    datasets: dict[str, Any] = {}
    seen, waiting = {_address(file)}, [(file, "", 0)]
    while waiting:
        group, prefix, depth = waiting.pop()
        for key in group:
            location = f"{prefix}{key}"
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                return {}, [f"{location}: expected an object of this file, got a soft or external link"]
            item = group[key]
            if _address(item) in seen or len(seen) > MAX_OBJECTS or depth > _MAX_DEPTH:
                return {}, [f"{location}: expected a tree of at most {MAX_OBJECTS} objects and {_MAX_DEPTH} levels"]
            seen.add(_address(item))
            if isinstance(item, h5py.Group):
                waiting.append((item, f"{location}/", depth + 1))
            elif isinstance(item, h5py.Dataset):
                datasets[location] = item
    return datasets, []


def _address(item) -> int:
    import h5py

    return h5py.h5o.get_info(item.id).addr


def _dtype_name(dataset) -> str:
    if dataset.dtype == np.dtype("V2") and _marked_dtype(dataset) == "bfloat16":
        return "bfloat16"
    return next((name for name, dtype in DTYPES.items() if dtype == dataset.dtype), str(dataset.dtype))


def _marked_dtype(dataset) -> str | None:
    """What Keras 3 notes beside numbers of a type that HDF5 lacks."""
    return str(dataset.attrs["dtype"]) if "dtype" in dataset.attrs else None


def _dataset_problem(dataset, file_bytes: int) -> str | None:
    if dataset.external or dataset.is_virtual:
        return "expected data in this file, got external or virtual data"
    if _dtype_name(dataset) not in DTYPES:
        return f"expected a dtype of {', '.join(DTYPES)}, got {str(dataset.dtype)[:100]}"
    if not dataset.shape or 0 in dataset.shape or len(dataset.shape) > 8:
        return f"expected one to 8 axes of positive length, got {dataset.shape}"
    filters = _filters(dataset)
    if filters not in ([], [_SHUFFLE], [_GZIP], [_SHUFFLE, _GZIP]):
        return f"expected no filters but gzip and shuffle before it, got those numbered {filters}"
    nbytes = math.prod(dataset.shape) * dataset.dtype.itemsize
    return _size_problem(dataset, nbytes, file_bytes)


def _size_problem(dataset, nbytes: int, file_bytes: int) -> str | None:
    stored, offset = dataset.id.get_storage_size(), dataset.id.get_offset()
    if stored > file_bytes or (offset or 0) + (stored if offset else 0) > file_bytes:
        return f"truncated: {stored} bytes in a file of {file_bytes}"
    if dataset.chunks is None:
        return None if stored == nbytes else f"expected {nbytes} bytes for {dataset.shape}, got {stored}"
    if nbytes > stored * _MAX_COMPRESSION:
        return f"expected at least one byte for {_MAX_COMPRESSION} of {dataset.shape}, got {stored} bytes"
    if math.prod(dataset.chunks) > 2 * math.prod(dataset.shape):
        return f"expected chunks smaller than the dataset, got {dataset.chunks}"
    expected = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    found = dataset.id.get_num_chunks()
    return None if found == expected else f"expected {expected} chunks, got {found}"


# -- writing ----------------------------------------------------------------------------------------------------------


def create(file: BinaryIO):
    """An h5py file in place of `file`, whose datasets begin at multiples of 64 bytes."""
    import h5py

    return h5py.File(file.name, "w", alignment_threshold=_ALIGNMENT, alignment_interval=_ALIGNMENT)


def write_values(
    file: BinaryIO,
    tensors: Iterable[PlannedTensor],
    offsets: Iterable[int],
    write_tensor: Callable[[IO[bytes], PlannedTensor], None],
) -> None:
    """Fills the datasets that `make_dataset` made, once h5py has closed the file."""
    for tensor, offset in zip(tensors, offsets, strict=True):
        file.seek(offset)
        write_tensor(file, tensor)
        assert file.tell() - offset == tensor.nbytes, tensor.name
    file.flush()
    os.fsync(file.fileno())


def make_dataset(h5, location: str, tensor: PlannedTensor) -> int:
    """Makes a dataset without its values; returns where in the file they belong."""
    import h5py

    parent, _, name = location.rpartition("/")
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.CONTIGUOUS)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    settings.set_obj_track_times(False)
    dtype, space = h5py.h5t.py_create(DTYPES[tensor.dtype]), h5py.h5s.create_simple(tensor.shape)
    dataset = h5py.h5d.create(h5.require_group(parent).id, name.encode(), dtype, space, settings)
    if tensor.dtype == "bfloat16":
        h5py.Dataset(dataset).attrs["dtype"] = tensor.dtype  # to HDF5 they are opaque bytes
    return dataset.get_offset()
