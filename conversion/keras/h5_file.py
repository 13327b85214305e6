"""The container that Keras 2 saves: HDF5 with the names of layers and weights in attributes.

A single file has a group for each layer, whose attribute lists its weights; of shards each lists its datasets directly.
Which datasets may be read, and how, is `hdf5`'s business; names, shards and models are others'.
Sources: `tf_keras.src.saving.legacy.hdf5_format` and what transformers 4.57.6 writes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from conversion.keras.hdf5 import MAX_OBJECTS, H5File, create, make_dataset, open_datasets, write_values
from conversion.safetensors_file import PlannedTensor
from opt_core.errors import CheckpointError, raise_if

_LAYER = "model"  # the one layer of the published TensorFlow models
_MAX_ATTRIBUTE_BYTES = 64512  # of HDF5; Keras splits longer lists


def open_file(path: Path) -> H5File:
    """Finds the datasets of a file that Keras 2 wrote; reads none.

    Raises:
        CheckpointError: lists every link, dataset and name that is not as Keras writes it.
    """
    return open_datasets(path, _listed_names)


def _listed_names(file, locations: list[str]) -> dict[str, str]:
    """Dataset to weight name, by the attributes."""
    layers = _read_names(file, "layer_names")
    if layers is None:
        raise CheckpointError("", ["layer_names: missing, expected the attribute that Keras 2 writes"])
    listed: list[tuple[str, str]] = []
    for layer in layers:
        weights = _read_names(file[layer], "weight_names") if layer in file else None
        listed += [(layer, layer)] if weights is None else [(f"{layer}/{name}", name) for name in weights]
    names, there = dict(listed), set(locations)
    counts = Counter(location for location, _ in listed)
    problems = [f"{name}: listed {count} times in the attributes" for name, count in counts.items() if count > 1]
    problems += [f"{name}: listed in the attributes, but not there" for name in names if name not in there]
    problems += [f"{name}: there, but not listed in the attributes" for name in locations if name not in names]
    raise_if(CheckpointError, "", problems)
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
    if math.prod(stored.shape) > MAX_OBJECTS or len(stored.shape) != 1 or stored.dtype.itemsize > _MAX_ATTRIBUTE_BYTES:
        raise ValueError(f"{attribute}: expected a list of names")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in group.attrs[attribute]]


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
    tensors = list(tensors)
    with create(file) as h5:
        prefix = f"{_LAYER}/{scope}/" if scope else ""
        offsets = [make_dataset(h5, f"{prefix}{tensor.name}", tensor) for tensor in tensors]
        _write_attributes(h5, [tensor.name for tensor in tensors], scope)
    write_values(file, tensors, offsets, write_tensor)


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
