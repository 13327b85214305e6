"""What a run needs beside the weights to go on as if it had never stopped, in files that every backend reads.

`training_state.json` holds the number of steps done, the seed and the recipe; `optimizer.safetensors` the moments of
AdamW, in float32, as `exp_avg.<name>` and `exp_avg_sq.<name>` in the published layout: so a run that began in one
framework goes on in another. The weights lie in the same folder, written before by `save_pretrained` or
`conversion.adapters`; the state names them by a hash and is refused beside others. Optimizers and models are not the
business of this module.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from conversion.manifest import MANIFEST_NAME
from conversion.safetensors_file import PlannedTensor, read_header, write_file
from conversion.slices import read_part
from conversion.staging import check_is_published, staging
from conversion.stored import MappedFile, StoredTensor
from opt_core.errors import CheckpointError, ConfigError, raise_if
from opt_core.json_file import read_json_object
from opt_core.optimization import Moments, TrainingRecipe

STATE_NAME, MOMENTS_NAME = "training_state.json", "optimizer.safetensors"
_VERSION = 1
_WEIGHTS_BY = (MANIFEST_NAME, "adapter_model.safetensors")  # small files that tell one set of weights from another


class TrainingState(NamedTuple):
    """A run as it was saved."""

    step: int  # steps done, which is the number of the next one, counted from 0
    seed: int
    recipe: TrainingRecipe
    moments: dict[str, Moments]  # canonical name to float32 arrays, views on the file
    extra: dict[str, Any]  # what else the writer kept, as JSON

    def read_slice(self, name: str, index: tuple[slice, ...]) -> Moments:
        """A part of both moments of a parameter; no more is read (`conversion.slices`)."""
        return Moments(*(read_part(array, index) for array in self.moments[name]))


def write_training_state(
    folder: str | os.PathLike,
    step: int,
    seed: int,
    recipe: TrainingRecipe,
    moments: Mapping[str, Moments],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes both files into `folder`, together or not at all, beside the weights that are there already.

    A process that is killed meanwhile leaves the older state, the new one, or what `read_training_state` refuses.

    Args:
        step: steps done.
        moments: canonical name to arrays in the schema's shape; of an adapter, `<module>.lora_A.weight` and
            `<module>.lora_B.weight`. In place of an array, whatever has a `shape` and an `__array__`, which is asked
            for once, when its turn comes.
        extra: JSON data, handed back by `read_training_state`.

    Raises:
        CheckpointError: moments that are NaN or infinite, each named.
    """
    folder, arrays = Path(folder), dict(_named(moments))
    problems: list[str] = []
    fields = {"version": _VERSION, "step": step, "seed": seed, "recipe": recipe.to_dict(), "extra": dict(extra or {})}
    fields["weights"] = _hash_of_weights(folder)
    tensors = [PlannedTensor(name, "float32", array.shape) for name, array in arrays.items()]
    text = json.dumps(fields, indent=2, allow_nan=False) + "\n"
    with staging(folder) as staged:
        with open(staged.folder / MOMENTS_NAME, "wb") as file:
            write_file(file, tensors, lambda file, tensor: _write(file, tensor, arrays[tensor.name], problems))
        raise_if(CheckpointError, str(folder), problems)
        (staged.folder / STATE_NAME).write_text(text, encoding="utf-8")
        staged.publish(replaced=lambda path: path.name in (STATE_NAME, MOMENTS_NAME), last=STATE_NAME)


def _named(moments: Mapping[str, Moments]) -> Iterator[tuple[str, Any]]:
    for name, pair in moments.items():
        for kind, array in zip(Moments._fields, pair, strict=True):
            yield f"{kind}.{name}", array


def _write(file, tensor: PlannedTensor, moment: Any, problems: list[str]) -> None:
    array = np.ascontiguousarray(np.asarray(moment), np.float32)
    if not np.isfinite(array).all():
        problems.append(f"{tensor.name}: expected finite numbers")
    file.write(array.data)


def _hash_of_weights(folder: Path) -> str | None:
    """Of the manifest, or of an adapter's file; None where no weights lie beside the state."""
    found = [folder / name for name in _WEIGHTS_BY if (folder / name).is_file()]
    return blake3(b"".join(path.read_bytes() for path in found)).hexdigest() if found else None


def read_training_state(
    folder: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> TrainingState:
    """The state that `write_training_state` wrote, checked; its arrays are read when they are used.

    Args:
        shapes: canonical name to shape of every parameter that is trained, which must be those of the moments.

    Raises:
        CheckpointError: there is none, it was not saved with the weights beside it, or lists what is wrong with it:
            fields, and every missing, unexpected or mis-shaped moment.
    """
    folder = Path(folder)
    check_is_published(folder)
    fields = _read_fields(folder / STATE_NAME)
    if fields["weights"] != _hash_of_weights(folder):
        text = "it was saved with other weights than those beside it; the program that saved was stopped in between"
        raise CheckpointError(str(folder), [f"{STATE_NAME}: {text}"])
    recipe = _recipe_of(fields["recipe"], str(folder / STATE_NAME))
    moments = _read_moments(folder / MOMENTS_NAME, shapes)
    return TrainingState(fields["step"], fields["seed"], recipe, moments, fields["extra"])


def _read_fields(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(str(path.parent), [f"{STATE_NAME}: missing; Trainer.save writes it"])
    try:
        fields = read_json_object(path)
    except ConfigError as error:
        raise CheckpointError(error.title, error.problems) from None
    raise_if(CheckpointError, str(path), _field_problems(fields))
    return fields


def _field_problems(fields: Mapping[str, Any]) -> Iterator[str]:
    for name in ("recipe", "extra"):
        if not isinstance(fields.get(name), dict):
            yield f"{name}: expected an object, got {str(fields.get(name))[:100]}"
    for name in ("step", "seed"):
        value = fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or (name == "step" and value < 0):
            yield f"{name}: expected an integer, got {str(value)[:100]}"
    if fields.get("version") != _VERSION:
        yield f"version: expected {_VERSION}, got {str(fields.get('version'))[:100]}"
    if not (fields.get("weights") is None or isinstance(fields["weights"], str)):
        yield f"weights: expected a hash, got {str(fields['weights'])[:100]}"


def _recipe_of(fields: Mapping[str, Any], source: str) -> TrainingRecipe:
    try:
        return TrainingRecipe.from_dict(fields, source=source)
    except ConfigError as error:
        raise CheckpointError(error.title, [f"recipe: {problem}" for problem in error.problems]) from None


def _read_moments(path: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> dict[str, Moments]:
    if not path.is_file():
        raise CheckpointError(str(path.parent), [f"{MOMENTS_NAME}: missing"])
    tensors = read_header(path).tensors
    first, second = Moments._fields
    names = [name.removeprefix(f"{first}.") for name in tensors if name.startswith(f"{first}.")]
    expected = {f"{kind}.{name}": tensors[f"{first}.{name}"].shape for name in names for kind in (first, second)}
    if shapes is not None:
        expected = {f"{kind}.{name}": tuple(shape) for name, shape in shapes.items() for kind in (first, second)}
    raise_if(CheckpointError, str(path), _moment_problems(tensors, expected))
    file = MappedFile(path, tensors)
    return {name: Moments(file.read(f"{first}.{name}"), file.read(f"{second}.{name}")) for name in shapes or names}


def _moment_problems(tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in expected.items():
        if name not in tensors:
            yield f"{name}: missing, expected {shape}"
        elif tensors[name].shape != shape:
            yield f"{name}: expected {shape}, got {tensors[name].shape}"
        elif tensors[name].dtype != "float32":
            yield f"{name}: expected float32, got {tensors[name].dtype}"
    for name, tensor in tensors.items():
        if name not in expected:
            yield f"{name}: unexpected, got {tensor.shape}"
