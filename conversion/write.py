"""Writes a checkpoint, one tensor at a time; a broken run leaves no half that passes for whole.

Every file is first written under a temporary name and synced; when all are complete they are renamed, config.json last.
"""

import contextlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from conversion import h5_file, msgpack_file, safetensors_file, torch_zip
from conversion.formats import FORMATS, Format, places, refusals
from conversion.index import parse_size, plan_shards, shard_name
from conversion.layout import Layout, stored_shape, to_stored
from conversion.safetensors_file import PlannedTensor
from conversion.stored import DTYPES
from opt_core.config import CONFIG_NAME, OPTConfig
from opt_core.config import DTYPES as CONFIG_DTYPES
from opt_core.errors import CheckpointError, InputError, raise_if
from opt_core.schema import check_shapes, shapes

CLASSES = {
    "base": "OPTModel",
    "causal-lm": "OPTForCausalLM",
    "sequence-classification": "OPTForSequenceClassification",
    "question-answering": "OPTForQuestionAnswering",
}
_WRITERS = {
    "safetensors": safetensors_file.write_file,
    "torch-zip": torch_zip.write_file,
    "msgpack": msgpack_file.write_file,
    "h5": h5_file.write_file,
}
_CAST_BYTES = 1 << 24


def write_checkpoint(
    target: str | os.PathLike,
    config: OPTConfig,
    tensors: Mapping[str, Callable[[], np.ndarray]] | Any,
    *,
    task: str = "causal-lm",
    format: str = "safetensors",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Writes config.json, the weights and, where they are sharded, their index into the folder `target`.

    Args:
        target: a folder, made if need be.
        config: written with `architectures` and `torch_dtype` set.
        tensors: the schema's names to functions that return the array (or to arrays), or an object with
            `read(name)`, `shapes` and `dtypes` such as a `Checkpoint`. Each is asked for when its turn comes; without
            a `dtype`, functions are called once more beforehand for their dtypes.
        dtype: "float32", "float16" or "bfloat16"; None keeps that of each tensor.
        format: a key of `conversion.formats.FORMATS`: "safetensors" and "torch-bin" hold the published layout,
            "flax-msgpack" and "flax-safetensors" that of the published Flax classes, "tf-h5" and "tf-safetensors" that
            of the published TensorFlow classes.
        overwrite: replaces an older checkpoint, whose shards and index do not stay behind.
        progress: called with (bytes written, bytes in all) after each tensor.

    Returns:
        The files written, config.json last.

    Raises:
        CheckpointError: the tensors are not those of the config, values overflow `dtype` (all of them are listed), or
            the format cannot hold this model as it is.
        FileExistsError: the folder holds a checkpoint and `overwrite` is false.
    """
    if format not in FORMATS or dtype not in (None, *CONFIG_DTYPES):
        raise InputError("write_checkpoint", _argument_problems(format, dtype))
    target, source = Path(target), _Source(tensors)
    _refuse_existing(target, overwrite)
    largest = parse_size(max_shard_size)
    planned = _plan(config, task, source, dtype, FORMATS[format])
    json_config = _config_to_write(config, task, planned)
    json_config.to_dict()  # a config that JSON cannot hold fails before anything is written
    shards = plan_shards({item.tensor: item.tensor.nbytes for item in planned}, largest)
    stream = _Stream(source, planned, progress)
    with _staging(target) as staged:
        _write_shards(staged, FORMATS[format], shards, stream)
        stream.check_complete()
        json_config.to_json(staged.path(CONFIG_NAME))
        return staged.publish()


def _argument_problems(format: str, dtype: str | None) -> Iterator[str]:
    if format not in FORMATS:
        yield f"format: expected one of {', '.join(FORMATS)}, got {format!r}"
    if dtype not in (None, *CONFIG_DTYPES):
        yield f"dtype: expected one of {', '.join(CONFIG_DTYPES)} or None, got {dtype!r}"


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder, got a file")
    found = sorted(path.name for path in target.iterdir() if _is_of_a_checkpoint(path.name)) if target.is_dir() else []
    if found and not overwrite:
        raise FileExistsError(f"{target}: holds {', '.join(found[:5])}; pass overwrite=True to replace them")


def _is_of_a_checkpoint(name: str) -> bool:
    return name == CONFIG_NAME or any(format.owns(name) for format in FORMATS.values())


# -- what will be written ---------------------------------------------------------------------------------------------


class _Source:
    """Tensors by the schema's names, however they were given."""

    def __init__(self, tensors):
        self._tensors = tensors
        self._is_mapping = isinstance(tensors, Mapping)
        self.names = list(tensors if self._is_mapping else tensors.shapes)

    def read(self, name: str) -> np.ndarray:
        if not self._is_mapping:
            return self._tensors.read(name)
        value = self._tensors[name]
        return np.asarray(value() if callable(value) else value)

    def dtype(self, name: str) -> str:
        return str(self.read(name).dtype) if self._is_mapping else self._tensors.dtypes[name]


class _Planned(NamedTuple):
    """A weight of the schema, and the tensor that will stand for it in the file."""

    weight: str
    shape: tuple[int, ...]
    layout: Layout
    tensor: PlannedTensor


def _plan(config: OPTConfig, task: str, source: _Source, dtype: str | None, format: Format) -> list[_Planned]:
    raise_if(CheckpointError, "write_checkpoint", refusals(format, config, task))
    expected = shapes(config, task)
    check_shapes({name: expected.get(name, ()) for name in source.names}, config, task, source="write_checkpoint")
    dtypes = {name: dtype or source.dtype(name) for name in expected}
    wrong = [
        f"{name}: expected a dtype of {', '.join(format.dtypes)} for {format.name}, got {got}"
        for name, got in dtypes.items()
        if got not in format.dtypes
    ]
    raise_if(CheckpointError, "write_checkpoint", wrong)
    return [
        _Planned(
            name, expected[name], place.layout, PlannedTensor(place.name, dtypes[name], stored_shape(place.layout))
        )
        for name, place in places(format, config, task).items()
    ]


def _config_to_write(config: OPTConfig, task: str, planned: list[_Planned]) -> OPTConfig:
    dtype = planned[0].tensor.dtype  # that of the token embedding
    return config.replace(architectures=[CLASSES[task]], torch_dtype=dtype if dtype in CONFIG_DTYPES else None)


# -- files ------------------------------------------------------------------------------------------------------------


class _Staged:
    """Files under temporary names in the target folder, and what each will be called."""

    def __init__(self, target: Path):
        self._target = target
        self._mark = f".{uuid.uuid4().hex[:8]}.tmp"
        self._names: list[str] = []

    def path(self, name: str) -> Path:
        """Where to write the file that will be called `name`."""
        self._names.append(name)
        return self._target / f"{name}{self._mark}"

    def publish(self) -> list[Path]:
        """Gives every file its name. The old config goes first and the new one comes last: between, nothing opens."""
        for name in self._names:
            _sync(self._target / f"{name}{self._mark}")
        (self._target / CONFIG_NAME).unlink(missing_ok=True)
        for path in self._target.iterdir():
            if _is_of_a_checkpoint(path.name):
                path.unlink()
        for name in self._names:
            os.replace(self._target / f"{name}{self._mark}", self._target / name)
        _sync(self._target)
        return [self._target / name for name in self._names]

    def discard(self) -> None:
        for name in self._names:
            (self._target / f"{name}{self._mark}").unlink(missing_ok=True)


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[_Staged]:
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    staged = _Staged(target)
    try:
        yield staged
    finally:
        staged.discard()
        if is_new:
            with contextlib.suppress(OSError):  # holds files after a success
                target.rmdir()


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_shards(staged: _Staged, format: Format, shards: list[list[PlannedTensor]], stream: "_Stream") -> None:
    weight_map: dict[str, str] = {}
    options = _container_options(format, is_single=len(shards) == 1)
    for number, shard in enumerate(shards, start=1):
        file_name = shard_name(format.stem, format.suffix, number, len(shards))
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), file_name))
        with open(staged.path(file_name), "wb") as file:
            _WRITERS[format.container](file, shard, stream.write, **options)
    if len(shards) > 1:
        prefix = f"{format.scope}/" if format.scope else ""
        weight_map = {f"{prefix}{name}": file_name for name, file_name in weight_map.items()}
        _write_index(staged.path(format.index_name), shards, weight_map)


def _container_options(format: Format, *, is_single: bool) -> dict[str, str]:
    if format.container == "safetensors":
        return {"framework": format.framework}
    return {"scope": format.scope} if format.container == "h5" and is_single else {}


def _write_index(path: Path, shards: list[list[PlannedTensor]], weight_map: dict[str, str]) -> None:
    tensors = [tensor for shard in shards for tensor in shard]
    metadata = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    index = {"metadata": metadata, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Stream:
    """Reads, converts and writes one tensor after the other, and keeps count of them."""

    def __init__(self, source: _Source, planned: list[_Planned], progress):
        self._source, self._progress = source, progress
        self._left = {item.tensor.name: item for item in planned}
        self._total_bytes = sum(item.tensor.nbytes for item in planned)
        self._done_bytes = 0
        self._overflows: list[str] = []

    def write(self, file: IO[bytes], tensor: PlannedTensor) -> None:
        item = self._left.pop(tensor.name)
        array, largest = self._read(item), 0.0
        for chunk in _chunks(to_stored(array, item.layout)):
            cast, overflowed = _cast(chunk, DTYPES[tensor.dtype])
            file.write(cast.view(np.uint8).data)
            largest = max(largest, overflowed)
        if largest:
            self._overflows.append(f"{item.weight}: its largest magnitude {largest:g} overflows {tensor.dtype}")
        self._done_bytes += tensor.nbytes
        if self._progress:
            self._progress(self._done_bytes, self._total_bytes)

    def _read(self, item: _Planned) -> np.ndarray:
        array = self._source.read(item.weight)
        if array.shape != item.shape or str(array.dtype) not in DTYPES:
            text = f"expected {item.shape} of a float dtype, got {array.shape} of {array.dtype}"
            raise CheckpointError("write_checkpoint", [f"{item.weight}: {text}"])
        return array

    def check_complete(self) -> None:
        """Raises when values overflowed, or when a planned tensor was not written."""
        raise_if(CheckpointError, "write_checkpoint", self._overflows)
        assert not self._left, f"not written: {', '.join(self._left)}"


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The values in row-major order, in flat pieces of at most `_CAST_BYTES`."""
    flat = np.ascontiguousarray(array).reshape(-1)
    step = _CAST_BYTES // flat.itemsize
    return (flat[start : start + step] for start in range(0, flat.size, step))


def _cast(chunk: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, float]:
    """The values rounded to `dtype`, and the largest finite magnitude that became infinite, or 0."""
    if chunk.dtype == dtype:
        return chunk, 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        cast = chunk.astype(dtype)
    if ml_dtypes.finfo(dtype).max >= ml_dtypes.finfo(chunk.dtype).max:  # nothing can overflow
        return cast, 0.0
    overflowed = np.isinf(cast)
    overflowed[overflowed] = np.isfinite(chunk[overflowed])
    return cast, float(np.abs(chunk[overflowed].astype(np.float64)).max()) if overflowed.any() else 0.0
