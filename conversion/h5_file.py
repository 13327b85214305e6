"""The container that Keras 2 saves: HDF5 with the names of layers and weights in attributes.

A single file has a group for each layer, whose attribute lists its weights; of shards each lists its datasets directly.
What lies in one run of the file is mapped, and only chunked or compressed datasets are read through h5py. Links that
leave the file, external and virtual data, and datasets that are larger than what is stored are refused. Names, shards
and models are not its business. Sources: `tf_keras.src.saving.legacy.hdf5_format` and what transformers 4.57.6 writes.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from conversion.safetensors_file import PlannedTensor
from conversion.stored import DTYPES, MappedFile, StoredTensor
from opt_core.errors import CheckpointError, raise_if

_MAX_DEPTH = 16
_MAX_OBJECTS = 1 << 17  # OPT's largest has 1540 tensors
_MAX_COMPRESSION = 1000  # bytes declared for one stored; deflate reaches 1032
_GZIP_AND_SHUFFLE = (1, 2)  # HDF5's numbers of filters
_LAYER = "model"  # the one layer of the published TensorFlow models
_MAX_ATTRIBUTE_BYTES = 64512  # of HDF5; Keras splits longer lists
_ALIGNMENT = 64


class H5File(MappedFile):
    """A mapped file, some of whose tensors only h5py can read."""

    def __init__(self, path: Path, tensors: dict[str, StoredTensor], packed: dict[str, str]):
        super().__init__(path, tensors)
        self._packed = packed  # name to dataset

    def read(self, name: str) -> np.ndarray:
        """As `MappedFile.read`; of a chunked or compressed dataset a copy."""
        if name not in self._packed:
            return super().read(name)
        import h5py

        try:
            with h5py.File(self.path, "r") as file:
                return file[self._packed[name]][()]
        except Exception as error:  # h5py raises what HDF5 reports as one of half a dozen types
            raise CheckpointError(str(self.path), [f"{name}: damaged: {str(error)[:200]}"]) from None


def open_file(path: Path) -> H5File:
    """Finds the datasets of a file; reads none.

    Raises:
        CheckpointError: lists every link, dataset and name that is not as Keras writes it.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return _open(file, path)
    except CheckpointError:
        raise
    except Exception as error:  # as above
        text = f"expected HDF5 as TensorFlow writes it, got a damaged or another file: {str(error)[:200]}"
        raise CheckpointError(str(path), [text]) from None


def _open(file, path: Path) -> H5File:
    if file.userblock_size:
        raise CheckpointError(str(path), [f"expected no user block, got one of {file.userblock_size} bytes"])
    datasets, problems = _walk(file)
    raise_if(CheckpointError, str(path), problems)
    names = _names(file, path)
    problems = [f"{name}: listed in the attributes, but not there" for name in names if name not in datasets]
    problems += [f"{name}: there, but not listed in the attributes" for name in datasets if name not in names]
    tensors, packed = {}, {}
    for location, dataset in datasets.items() if not problems else ():
        name, problem = names[location], _dataset_problem(dataset, path.stat().st_size)
        if problem:
            problems.append(f"{location}: {problem}")
            continue
        offset = dataset.id.get_offset()
        tensors[name] = StoredTensor(_dtype_name(dataset), dataset.shape, offset or 0)
        if offset is None:
            packed[name] = location
    raise_if(CheckpointError, str(path), problems)
    return H5File(path, tensors, packed)


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
            if _address(item) in seen or len(seen) > _MAX_OBJECTS or depth > _MAX_DEPTH:
                return {}, [f"{location}: expected a tree of at most {_MAX_OBJECTS} objects and {_MAX_DEPTH} levels"]
            seen.add(_address(item))
            if isinstance(item, h5py.Group):
                waiting.append((item, f"{location}/", depth + 1))
            elif isinstance(item, h5py.Dataset):
                datasets[location] = item
    return datasets, []


def _address(item) -> int:
    import h5py

    return h5py.h5o.get_info(item.id).addr


def _names(file, path: Path) -> dict[str, str]:
    """Dataset to weight name, by the attributes."""
    layers = _read_names(file, "layer_names")
    if layers is None:
        raise CheckpointError(str(path), ["layer_names: missing, expected the attribute that Keras 2 writes"])
    names: dict[str, str] = {}
    for layer in layers:
        weights = _read_names(file[layer], "weight_names") if layer in file else None
        names |= {layer: layer} if weights is None else {f"{layer}/{name}": name for name in weights}
    return names


def _read_names(group, attribute: str) -> list[str] | None:
    """A list of names, put together again where Keras split it; None where there is none."""
    if attribute in group.attrs:
        return _read_list(group, attribute)
    if f"{attribute}0" not in group.attrs:
        return None
    parts: list[str] = []
    for number in range(len(group.attrs)):
        if f"{attribute}{number}" in group.attrs:
            parts += _read_list(group, f"{attribute}{number}")
    return parts


def _read_list(group, attribute: str) -> list[str]:
    stored = group.attrs.get_id(attribute)
    if math.prod(stored.shape) > _MAX_OBJECTS or len(stored.shape) != 1 or stored.dtype.itemsize > _MAX_ATTRIBUTE_BYTES:
        raise ValueError(f"{attribute}: expected a list of names")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in group.attrs[attribute]]


def _dtype_name(dataset) -> str:
    return next((name for name, dtype in DTYPES.items() if dtype == dataset.dtype), str(dataset.dtype))


def _dataset_problem(dataset, file_bytes: int) -> str | None:
    if dataset.external or dataset.is_virtual:
        return "expected data in this file, got external or virtual data"
    if _dtype_name(dataset) not in DTYPES:
        return f"expected a dtype of {', '.join(DTYPES)}, got {str(dataset.dtype)[:100]}"
    if not dataset.shape or 0 in dataset.shape or len(dataset.shape) > 8:
        return f"expected one to 8 axes of positive length, got {dataset.shape}"
    settings = dataset.id.get_create_plist()
    filters = {settings.get_filter(number)[0] for number in range(settings.get_nfilters())}
    if not filters <= {*_GZIP_AND_SHUFFLE}:
        return f"expected no filters but gzip and shuffle, got those numbered {sorted(filters)}"
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


def write_file(
    file: BinaryIO,
    tensors: Iterable[PlannedTensor],
    write_tensor: Callable[[IO[bytes], PlannedTensor], None],
    scope: str = "",
) -> None:
    """Writes groups and empty datasets for all `tensors`, then calls `write_tensor(file, tensor)` at the place of each.

    `write_tensor` must write exactly `tensor.nbytes` bytes.

    Args:
        file: a file of the file system, since HDF5 opens it by its name.
        scope: the first part of the names of weights in a single file; "" writes a shard.
    """
    import h5py

    tensors = list(tensors)
    with h5py.File(file.name, "w", alignment_threshold=_ALIGNMENT, alignment_interval=_ALIGNMENT) as h5:
        prefix = f"{_LAYER}/{scope}/" if scope else ""
        offsets = [_make_dataset(h5, f"{prefix}{tensor.name}", tensor) for tensor in tensors]
        _write_attributes(h5, [tensor.name for tensor in tensors], scope)
    for tensor, offset in zip(tensors, offsets, strict=True):
        file.seek(offset)
        write_tensor(file, tensor)
        assert file.tell() - offset == tensor.nbytes, tensor.name
    file.flush()
    os.fsync(file.fileno())


def _make_dataset(h5, location: str, tensor: PlannedTensor) -> int:
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
    return dataset.get_offset()


def _write_attributes(h5, names: list[str], scope: str) -> None:
    if not scope:
        _write_names(h5, "layer_names", names)
        return
    _write_names(h5, "layer_names", [_LAYER])
    h5.attrs["backend"] = b"tensorflow"
    h5.attrs["keras_version"] = b"2.15.0"  # the last whose own name was Keras; tf_keras writes the same layout
    _write_names(h5[_LAYER], "weight_names", [f"{scope}/{name}" for name in names])
    _write_names(h5.require_group("top_level_model_weights"), "weight_names", [])


def _write_names(group, attribute: str, names: list[str]) -> None:
    for name, part in _attributes(attribute, np.array([name.encode() for name in names], dtype="S" if names else "S1")):
        group.attrs[name] = part


def _attributes(attribute: str, names: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The list under its name, or as numbered parts where HDF5 holds no list as long."""
    count = -(-names.nbytes // _MAX_ATTRIBUTE_BYTES)
    while count > 1 and any(part.nbytes > _MAX_ATTRIBUTE_BYTES for part in np.array_split(names, count)):
        count += 1
    if count <= 1:
        yield attribute, names
        return
    yield from ((f"{attribute}{number}", part) for number, part in enumerate(np.array_split(names, count)))
