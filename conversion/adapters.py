"""Low-rank adapters in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`, or an older `.bin`.

Each pair of matrices has the canonical name of its linear module; nothing of PEFT is imported, nothing of a file
executed. What an adapter computes is `opt_core.lora`'s business, merging it into a model each backend's. Source of the
names: `get_peft_model_state_dict` of PEFT 0.21.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from conversion.names import canonical_name
from conversion.pytorch import torch_zip
from conversion.safetensors_file import PlannedTensor, read_header, write_file
from conversion.staging import check_is_published, staging
from conversion.stored import DTYPES, MappedFile
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, raise_if
from opt_core.json_file import read_json_object
from opt_core.lora import MODULES, LoraConfig, Pair, adapter_shapes
from opt_core.schema import SCHEMA, published_name

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_NAME, ADAPTER_BIN_NAME = "adapter_model.safetensors", "adapter_model.bin"
_ROOT = "base_model.model."
_LAYER = re.compile(r"(?<=\.layers\.)(0|[1-9][0-9]{0,5})(?=\.)")
# "q_proj" -> "decoder.layers.{layer}.self_attn.q_proj"
_TEMPLATES = {
    row.name.split(".")[-2]: row.name.removesuffix(".weight")
    for row in SCHEMA
    if row.name.split(".")[-2] in MODULES and row.kind == "linear"
}
_Shapes = tuple[tuple[int | None, int | None], tuple[int | None, int | None]]  # of A and B
_STORED = re.compile(rf"{re.escape(_ROOT)}(.+)\.lora_([AB])\.weight")


def read_adapter(source: str | os.PathLike, config: OPTConfig | None = None) -> tuple[LoraConfig, dict[str, Pair]]:
    """The config of an adapter, and its matrices by the canonical name of each linear module, in the stored dtype.

    Args:
        source: a folder, or the weight file in it.
        config: of the base model, whose shapes the matrices must then have. Without it, they are compared with each
            other: a pair for the same modules in every layer, all of the rank that the adapter's config says.

    Raises:
        CheckpointError: no adapter is there, or lists every missing, unexpected and mis-shaped tensor.
        ConfigError: its config is of no adapter that is computed here; see `LoraConfig.from_dict`.
    """
    path = _weight_file(Path(source))
    check_is_published(path.parent)
    lora = read_adapter_config(path.parent)
    tensors = torch_zip.read_tensors(path) if path.suffix == ".bin" else read_header(path).tensors
    stored, problems = _find_matrices(tensors)
    found = {place: tensors[name].shape for place, name in stored.items()}
    raise_if(CheckpointError, str(path), [*problems, *_shape_problems(found, lora, config)])
    file, modules = MappedFile(path, tensors), dict.fromkeys(module for module, _ in stored)
    return lora, {module: {letter: file.read(stored[module, letter]) for letter in "AB"} for module in modules}


def read_adapter_config(folder: str | os.PathLike) -> LoraConfig:
    """The config of the adapter in a folder; raises as `read_adapter` does."""
    path = Path(folder) / ADAPTER_CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(str(folder), [f"{ADAPTER_CONFIG_NAME}: missing, so this is no adapter"])
    return LoraConfig.from_dict(read_json_object(path), source=str(path))


def _weight_file(source: Path) -> Path:
    if not source.is_dir():
        if not source.is_file():
            raise CheckpointError(str(source), ["no such file or folder"])
        return source
    for name in (ADAPTER_NAME, ADAPTER_BIN_NAME):
        if (source / name).is_file():
            return source / name
    raise CheckpointError(str(source), [f"no adapter: looked for {ADAPTER_NAME}, {ADAPTER_BIN_NAME}"])


def _find_matrices(names: Iterable[str]) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Canonical module name and letter to stored name; and the problems."""
    stored: dict[tuple[str, str], str] = {}
    problems = []
    for name in names:
        module, letter = _module_of(name)
        if module is None:
            problems.append(f"{name[:200]}: unexpected, not a matrix of an adapter of OPT")
        elif (module, letter) in stored:
            problems.append(f"{name[:200]}: stored twice, also as {stored[module, letter]}")
        else:
            stored[module, letter] = name
    return stored, problems


def _module_of(stored: str) -> tuple[str | None, str]:
    """The canonical name of the linear module, or None, and the letter of the matrix."""
    match = _STORED.fullmatch(stored)
    if match is None:
        return None, ""
    module = canonical_name(f"{match[1]}.weight").removesuffix(".weight")
    return (module if _LAYER.sub("{layer}", module, count=1) in _TEMPLATES.values() else None), match[2]


def _shape_problems(
    found: Mapping[tuple[str, str], tuple[int, ...]], lora: LoraConfig, config: OPTConfig | None
) -> Iterator[str]:
    shapes: Mapping[str, _Shapes] = adapter_shapes(config, lora) if config else dict(_shapes_by_each_other(found, lora))
    expected = {
        (module, letter): shape for module, pair in shapes.items() for letter, shape in zip("AB", pair, strict=True)
    }
    if not found:
        yield "expected the matrices of an adapter, got none"
    layers = sorted({int(module.split(".")[2]) for module, _ in found})
    if config is None and layers != list(range(len(layers))):
        yield f"expected matrices of all layers from 0 on, got those of {', '.join(map(str, layers))}"
    for place, shape in expected.items():
        if place not in found:
            yield f"{_tensor_name(place)}: missing, expected {_text(shape)}"
        elif len(found[place]) != 2 or any(
            want not in (got, None) for got, want in zip(found[place], shape, strict=True)
        ):
            yield f"{_tensor_name(place)}: expected {_text(shape)}, got {_text(found[place])}"
    for place in found:
        if place not in expected:
            yield f"{_tensor_name(place)}: unexpected, got {_text(found[place])}"


def _shapes_by_each_other(found: Iterable[tuple[str, str]], lora: LoraConfig) -> Iterator[tuple[str, _Shapes]]:
    """Every targeted module in every layer that any matrix is of; None for sizes that only a model's config tells."""
    for layer in sorted({int(module.split(".")[2]) for module, _ in found}):
        for target in lora.target_modules:
            yield _TEMPLATES[target].format(layer=layer), ((lora.r, None), (None, lora.r))


def _tensor_name(place: tuple[str, str]) -> str:
    return f"{place[0]}.lora_{place[1]}.weight"


def _text(shape: tuple) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"


def write_adapter(folder: str | os.PathLike, lora: LoraConfig, arrays: Mapping[str, Pair]) -> None:
    """Writes an adapter as PEFT does, its files together or not at all, in place of an older one.

    Args:
        lora: its `task` tells where the published class puts its decoder; None means one with a head, as all but the
            base class are.
        arrays: canonical module name (`decoder.layers.0.self_attn.q_proj`) to {"A": (r, in), "B": (out, r)}.

    Raises:
        CheckpointError: lists every missing, unexpected or mis-shaped matrix, and every one with values that are NaN
            or infinite.
    """
    folder, task = Path(folder), lora.task or "causal-lm"
    found = {(module, letter): np.asarray(array) for module, pair in arrays.items() for letter, array in pair.items()}
    problems = list(_shape_problems({place: array.shape for place, array in found.items()}, lora, None))
    problems += [f"{_tensor_name(place)}: expected finite floats" for place, array in found.items() if _spoilt(array)]
    raise_if(CheckpointError, "write_adapter", problems)
    stored = {f"{_ROOT}{published_name(_tensor_name(place), task)}": array for place, array in found.items()}
    tensors = [PlannedTensor(name, array.dtype.name, array.shape) for name, array in stored.items()]
    with staging(folder) as staged:
        with open(staged.folder / ADAPTER_NAME, "wb") as file:
            write_file(file, tensors, lambda file, tensor: _write(file, stored[tensor.name]))
        text = json.dumps(lora.to_dict(), indent=2, sort_keys=True) + "\n"
        (staged.folder / ADAPTER_CONFIG_NAME).write_text(text, encoding="utf-8")
        names = (ADAPTER_CONFIG_NAME, ADAPTER_NAME, ADAPTER_BIN_NAME)
        staged.publish(replaced=lambda path: path.name in names, last=ADAPTER_CONFIG_NAME)


def _spoilt(array: np.ndarray) -> bool:
    return array.dtype.name not in DTYPES or not np.isfinite(array).all()


def _write(file: IO[bytes], array: np.ndarray) -> None:
    file.write(np.ascontiguousarray(array, DTYPES[array.dtype.name]).tobytes())
