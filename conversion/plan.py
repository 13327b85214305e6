"""What a checkpoint will consist of, settled before anything is written: tensors, their weights, places and dtypes.

Also where the values come from: arrays, functions, or another checkpoint. Files are the business of `conversion.write`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from conversion.background import owned_bytes
from conversion.formats import Format, Place, places, refusals
from conversion.layout import stored_shape
from conversion.safetensors_file import PlannedTensor
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, raise_if
from opt_core.schema import check_shapes, shapes


class Source:
    """Tensors by the schema's names, however they were given."""

    def __init__(self, tensors):
        self._tensors = tensors
        self._is_mapping = isinstance(tensors, Mapping)
        self._read_once: set[str] = set()
        self.names = list(tensors if self._is_mapping else tensors.shapes)

    def read(self, name: str) -> np.ndarray:
        """An array of any strides, not to be written to."""
        if self._is_mapping:
            value = self._tensors[name]
            return np.asarray(value() if callable(value) else value)
        array = self._whole(name)
        if owned_bytes(array):
            self._read_once.add(name)
        return array

    def read_again(self, name: str) -> np.ndarray | None:
        """What `read` has given, where it costs no computation or memory; else None."""
        is_made = self._is_mapping and callable(self._tensors[name])
        return None if is_made or name in self._read_once else self.read(name)

    def dtype(self, name: str) -> str:
        return str(self.read(name).dtype) if self._is_mapping else self._tensors.dtypes[name]

    def _whole(self, name: str) -> np.ndarray:
        if not hasattr(self._tensors, "pieces"):
            return self._tensors.read(name)
        pieces, axis = self._tensors.pieces(name)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis)


class Planned(NamedTuple):
    """A tensor of a file, and the weights of the schema that it consists of, in order."""

    tensor: PlannedTensor
    weights: tuple[str, ...]
    places: tuple[Place, ...]


def plan(
    config: OPTConfig, task: str, source: Source, dtype: str | None, format: Format, parts: int = 1
) -> list[Planned]:
    """What each file holds, or each of so many model-parallel parts.

    Raises:
        CheckpointError: the format cannot hold the model, or the names are not those of the config and the task.
    """
    raise_if(CheckpointError, "write_checkpoint", refusals(format, config, task, parts))
    expected = shapes(config, task)
    check_shapes({name: expected.get(name, ()) for name in source.names}, config, task, source="write_checkpoint")
    dtypes = {name: dtype or source.dtype(name) for name in expected}
    joint = defaultdict(list)
    for name, place in places(format, config, task, parts).items():
        joint[place.name].append((name, place))
    planned = [_planned(stored, sorted(weights, key=_slot), dtypes) for stored, weights in joint.items()]
    raise_if(CheckpointError, "write_checkpoint", [*_dtype_problems(format, dtypes), *_joint_problems(planned, dtypes)])
    return planned


def _slot(weight: tuple[str, Place]) -> tuple[int, int]:
    return weight[1].layout.slot or (0, 1)


def _planned(stored: str, weights: list[tuple[str, Place]], dtypes: Mapping[str, str]) -> Planned:
    names, places_ = zip(*weights, strict=True)
    rows, *rest = stored_shape(places_[0].layout)
    return Planned(PlannedTensor(stored, dtypes[names[0]], (rows * len(names), *rest)), names, places_)


def _dtype_problems(format: Format, dtypes: Mapping[str, str]) -> Iterator[str]:
    for got, count in Counter(dtypes.values()).items():
        if got not in format.dtypes:
            of = f"{count} of {len(dtypes)} weights; `dtype` rounds them to another"
            yield f"expected a dtype of {', '.join(format.dtypes)} for {format.name}, got {got} in {of}"


def _joint_problems(planned: list[Planned], dtypes: Mapping[str, str]) -> Iterator[str]:
    for tensor, names, _ in planned:
        if len(found := {dtypes[name] for name in names}) > 1:
            yield f"{tensor.name}: expected one dtype for {', '.join(names)}, got {', '.join(sorted(found))}"


def whole_shape(place: Place, parts: int) -> tuple[int, ...]:
    """The schema's shape of a weight, all model-parallel parts together."""
    shape = [place.layout.lengths[letter] for letter in place.layout.dims]
    if place.axis is not None:
        shape[place.axis] *= parts
    return tuple(shape)
