"""The weights of KerasHub's presets: one `model.weights.h5`, or shards of it with `model.weights.json`.

The index maps groups of variables, not variables, to the files that have some of them. Names that older versions gave
to layers are turned into today's; what each stands for, the table of formats says. The container is `keras_h5`.
Sources: `keras_hub.src.utils.preset_utils` of KerasHub 0.32; `saving_lib.ShardedH5IOStore` of Keras 3.15.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, BinaryIO

from conversion.index import file_problems, plan_shards
from conversion.keras import keras_h5
from conversion.keras.hdf5 import H5File
from conversion.safetensors_file import PlannedTensor
from opt_core.errors import CheckpointError, ConfigError, raise_if
from opt_core.json_file import read_json_object

WEIGHTS_NAME = "model.weights.h5"
INDEX_NAME = "model.weights.json"
_LARGEST_FILE = 10 * 2**30  # bytes of weights above which KerasHub makes shards

# Names of other times and savers -> today's: roots of Keras 2, a backbone inside OPTCausalLM, private attributes.
_OLDER_PATHS = (
    (re.compile(r"_layer_checkpoint_dependencies/"), "layers/"),
    (re.compile(r"^layers/opt_backbone/"), ""),
    (re.compile(r"/_(query|key|value|output)_dense/"), r"/\1_dense/"),
)

# Last part of a layer's path -> its name, where that is not the same without the underscore.
_LAYER_NAMES = {
    "query_dense": "query",
    "key_dense": "key",
    "value_dense": "value",
    "output_dense": "attention_output",
    "layer_normalization": "layer_norm",
}


def open_file(path: Path) -> H5File:
    """Finds the weights of a `.weights.h5` or a `.keras` archive, by the names that Keras 3.15 gives them.

    Raises:
        CheckpointError: see `keras_h5.open_file`.
    """
    return keras_h5.open_file(path, _todays_name)


def write_file(
    file: BinaryIO, tensors: Iterable[PlannedTensor], write_tensor: Callable[[IO[bytes], PlannedTensor], None]
) -> None:
    """Writes a `.weights.h5` that `OPTBackbone.load_weights` takes; see `keras_h5.write_file`."""
    keras_h5.write_file(file, tensors, write_tensor, _layer_name)


def _todays_name(path: str) -> str:
    for older, new in _OLDER_PATHS:
        path = older.sub(new, path)
    return path


def _layer_name(path: str) -> str:
    last = path.rpartition("/")[2]
    return _LAYER_NAMES.get(last, last.removeprefix("_"))


# -- shards -----------------------------------------------------------------------------------------------------------


def open_shards(index: Path) -> list[H5File]:
    """Opens every shard of a `model.weights.json`, and compares what they hold with it.

    Raises:
        CheckpointError: lists every unsafe, missing or incomplete entry.
    """
    groups = _groups_of(index)
    files = list(dict.fromkeys(file for names in groups.values() for file in names))
    problems = [problem for file in files for problem in _shard_problems(index, file)]
    expected = [f"{_stem(index)}_{number:05d}.weights.h5" for number in range(len(files))]
    not_named = [f"{file}: not in the index, which names {len(files)} shards" for file in expected if file not in files]
    raise_if(CheckpointError, str(index), problems or not_named)
    opened = [open_file(index.parent / file) for file in files]
    raise_if(CheckpointError, str(index), _disagreements(groups, opened))
    return opened


def _groups_of(index: Path) -> dict[str, list[str]]:
    """Path of a group of variables to the shards that have some of them, both as the index says."""
    try:
        weight_map = read_json_object(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(error.title, error.problems) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(str(index), ["weight_map: expected an object of groups and file names"])
    groups = {name.strip("/"): files if isinstance(files, list) else [files] for name, files in weight_map.items()}
    wrong = [name for name, files in groups.items() if not files or not all(isinstance(file, str) for file in files)]
    raise_if(CheckpointError, str(index), [f"{name}: expected a file name or a list of them" for name in wrong])
    todays = {_todays_name(name): files for name, files in groups.items()}
    return {name: files for name, files in todays.items() if not keras_h5.is_state_of_training(name)}


def _stem(index: Path) -> str:
    return index.name.removesuffix(".weights.json")


def _shard_problems(index: Path, file: str) -> list[str]:
    if not re.fullmatch(re.escape(_stem(index)) + r"_\d{5}\.weights\.h5", file):
        return [f"{file[:200]!r}: expected {_stem(index)}_00000.weights.h5 or the like, beside the index"]
    return file_problems(index, file)


def _disagreements(groups: dict[str, list[str]], opened: list[H5File]) -> list[str]:
    listed = {(group, file) for group, files in groups.items() for file in files}
    places: dict[str, list[str]] = {}
    for shard in opened:
        for name in shard.tensors:
            places.setdefault(name, []).append(shard.path.name)
    stored = {(name.rpartition("/")[0], file) for name, files in places.items() for file in files}
    problems = [f"{name}: stored in {' and '.join(files)}" for name, files in places.items() if len(files) > 1]
    problems += [f"{group}: stored in {file}, not in the index" for group, file in sorted(stored - listed)]
    problems += [f"{group}: the index says {file}, where it is not" for group, file in sorted(listed - stored)]
    return problems


def write_folder(
    folder: Path, tensors: Iterable[PlannedTensor], write_tensor: Callable[[IO[bytes], PlannedTensor], None]
) -> None:
    """Writes a preset's weights into an empty folder: one file, or shards and their index where KerasHub makes shards.

    `write_tensor` must write exactly `tensor.nbytes` bytes.
    """
    shards = plan_shards({tensor: tensor.nbytes for tensor in tensors}, _LARGEST_FILE)
    is_single = len(shards) == 1
    names = [WEIGHTS_NAME if is_single else f"model_{number:05d}.weights.h5" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with open(folder / name, "wb") as file:
            write_file(file, shard, write_tensor)
    if not is_single:
        (folder / INDEX_NAME).write_text(_index_of(dict(zip(names, shards, strict=True))), encoding="utf-8")


def _index_of(shards: Mapping[str, list[PlannedTensor]]) -> str:
    weight_map: dict[str, list[str]] = {}
    for file, tensors in shards.items():
        for tensor in tensors:
            files = weight_map.setdefault(f"/{tensor.name.rpartition('/')[0]}", [])
            if file not in files:
                files.append(file)
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    return json.dumps({"metadata": {"total_size": float(total)}, "weight_map": weight_map}, indent=4)
