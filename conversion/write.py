"""Writes a checkpoint, one tensor at a time; a broken run leaves no half that passes for whole.

Every file is first written into a hidden folder; when all are complete, synced and read again, they get their names.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion.background import Background
from conversion.containers import CONTAINERS
from conversion.formats import FORMATS, Format
from conversion.index import parse_size, plan_shards, shard_name
from conversion.manifest import MANIFEST_NAME, Manifest, write_manifest
from conversion.plan import Planned, Source, plan
from conversion.safetensors_file import PlannedTensor
from conversion.staging import staging
from conversion.stream import Stream
from conversion.verification import verify_written
from opt_core.config import CONFIG_NAME, OPTConfig
from opt_core.config import DTYPES as CONFIG_DTYPES
from opt_core.errors import InputError, raise_if

CLASSES = {
    "base": "OPTModel",
    "causal-lm": "OPTForCausalLM",
    "sequence-classification": "OPTForSequenceClassification",
    "question-answering": "OPTForQuestionAnswering",
}
DEFAULT_SHARD_SIZE = "5GB"
_FOLDERS = ("orbax", "variables", "assets")  # of checkpoints; `checkpoint`, of TensorFlow, is a file


def write_checkpoint(
    target: str | os.PathLike,
    config: OPTConfig,
    tensors: Mapping[str, Callable[[], np.ndarray]] | Any,
    *,
    task: str = "causal-lm",
    format: str = "safetensors",
    dtype: str | None = None,
    parts: int = 1,
    max_shard_size: int | str | None = None,
    tokenizer_folder: str | os.PathLike | None = None,
    overwrite: bool = False,
    verify: bool = True,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Writes config.json, the weights, the manifest and, where they are sharded, their index into the folder `target`.

    Args:
        target: a folder, made if need be.
        config: written with `architectures` and `torch_dtype` set.
        tensors: the schema's names to functions that return the array (or to arrays), or an object with
            `read(name)`, `shapes` and `dtypes` such as a `Checkpoint`. Each is asked for when its turn comes; without
            a `dtype`, functions are called once more beforehand for their dtypes. With `parts`, each part asks again.
        dtype: "float32", "float16" or "bfloat16"; None keeps that of each tensor.
        format: a key of `conversion.formats.FORMATS`: "safetensors" and "torch-bin" hold the published layout,
            "flax-msgpack" and "flax-safetensors" that of the published Flax classes, "tf-h5" and "tf-safetensors" that
            of the published TensorFlow classes.
        parts: model-parallel parts of metaseq, each a file; 1 for every other format.
        max_shard_size: bytes, or "300MB", "2GiB"; None for 5 GB in the formats that have shards. The others refuse it.
        tokenizer_folder: where vocab.json and merges.txt are, for the formats that store the tokenizer with the model,
            which "keras-hub" alone does; the others leave it to the caller.
        overwrite: replaces an older checkpoint, whose shards and index do not stay behind.
        verify: before the files get their names, reads every weight again and compares it with what was to be written.
        allow_nonfinite: keeps NaN and infinities, which are refused otherwise.
        progress: called with (bytes done, bytes in all) after each tensor; bytes count again when they are verified.

    Returns:
        The files written, weights first, config.json last.

    Raises:
        CheckpointError: the tensors are not those of the config; values overflow `dtype`, are NaN or infinite, or read
            back as others (all such weights are listed); or the format cannot hold this model as it is.
        FileExistsError: the folder holds a checkpoint and `overwrite` is false.
    """
    raise_if(InputError, "write_checkpoint", _argument_problems(format, dtype, parts, max_shard_size))
    target, source, to = Path(target), Source(tensors), FORMATS[format]
    refuse_existing(target, overwrite)
    largest = parse_size(DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size)
    planned = plan(config, task, source, dtype, to, parts)
    json_config = _config_to_write(config, task, planned)
    json_config.to_dict()  # a config that JSON cannot hold fails before anything is written
    advance = _progress(progress, (1 + verify) * parts * sum(item.tensor.nbytes for item in planned))
    with staging(target) as staged:
        with staged.synced(), Background() as background:
            stream = Stream(source, planned, parts, background, advance)
            _write_weights(staged.folder, to, planned, stream, json_config, largest)
            records = stream.finish(allow_nonfinite=allow_nonfinite)
            _write_beside(staged.folder, to, json_config, task, tokenizer_folder)
            write_manifest(staged.folder, Manifest(format, task, records))
            if verify:
                verify_written(staged.folder, records, source, _skipped_rows(planned), advance)
        return staged.publish(replaced=is_of_a_checkpoint, last=CONFIG_NAME)


def _progress(report: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """From the number of bytes at each step to that of all so far."""
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if report:
            report(done, total)

    return advance


def _skipped_rows(planned: list[Planned]) -> dict[str, int]:
    return {
        name: place.layout.skip_rows for item in planned for name, place in zip(item.weights, item.places, strict=True)
    }


def _argument_problems(format: str, dtype: str | None, parts: int, max_shard_size) -> Iterator[str]:
    written = [it.name for it in FORMATS.values() if it.is_written]
    if format not in written:
        yield f"format: expected one of {', '.join(written)}, got {format!r}"
    if dtype not in (None, *CONFIG_DTYPES):
        yield f"dtype: expected one of {', '.join(CONFIG_DTYPES)} or None, got {dtype!r}"
    if type(parts) is not int or parts < 1:
        yield f"parts: expected a number from 1, got {parts!r}"
    if max_shard_size is not None and format in written and not FORMATS[format].has_shards:
        yield f"max_shard_size: expected none for {format}, which has no shards, got {max_shard_size!r}"


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raises FileExistsError where a file, or without `overwrite` a checkpoint, is in the way."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder, got a file")
    found = entries_of_a_checkpoint(target) if target.is_dir() else []
    if found and not overwrite:
        raise FileExistsError(f"{target}: holds {', '.join(found[:5])}; pass overwrite=True to replace them")


def entries_of_a_checkpoint(folder: Path) -> list[str]:
    """The names in a folder that checkpoints of any format consist of."""
    return sorted(path.name for path in folder.iterdir() if is_of_a_checkpoint(path))


def is_of_a_checkpoint(path: Path) -> bool:
    """True for what checkpoints of any format consist of, by the name and by whether it is a folder."""
    if path.is_dir() != (path.name in _FOLDERS):
        return False
    return path.name in (CONFIG_NAME, MANIFEST_NAME) or any(format.owns(path.name) for format in FORMATS.values())


def _config_to_write(config: OPTConfig, task: str, planned: list[Planned]) -> OPTConfig:
    """`torch_dtype` is what other programs load: of mixed dtypes float32, which rounds none of the others."""
    dtypes = {item.tensor.dtype for item in planned}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return config.replace(architectures=[CLASSES[task]], torch_dtype=dtype if dtype in CONFIG_DTYPES else None)


# -- files ------------------------------------------------------------------------------------------------------------


def _write_weights(
    folder: Path, format: Format, planned: list[Planned], stream: Stream, config: OPTConfig, largest: int
) -> None:
    tensors, container = [item.tensor for item in planned], CONTAINERS[format.container]
    if format.is_parallel:
        assert container.write
        for part in range(stream.parts):
            with open(folder / format.part_name(part), "wb") as file:
                container.write(file, tensors, stream.writer(part), config, stream.parts)
    elif container.write_folder:
        container.write_folder(folder, tensors, stream.writer())
    else:
        _write_shards(folder, format, plan_shards({tensor: tensor.nbytes for tensor in tensors}, largest), stream)


def _write_shards(folder: Path, format: Format, shards: list[list[PlannedTensor]], stream: Stream) -> None:
    write = CONTAINERS[format.container].write
    assert write
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = shard_name(format.stem, format.suffix, number, len(shards))
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), file_name))
        with open(folder / file_name, "wb") as file:
            write(file, shard, stream.writer(), format, is_single=len(shards) == 1)
    if len(shards) > 1:
        prefix = f"{format.scope}/" if format.scope else ""
        weight_map = {f"{prefix}{name}": file_name for name, file_name in weight_map.items()}
        _write_index(folder / format.index_name, shards, weight_map)


def _write_beside(folder: Path, format: Format, config: OPTConfig, task: str, tokenizer_folder) -> None:
    files_beside = CONTAINERS[format.container].files_beside
    if files_beside is None:
        config.to_json(folder / CONFIG_NAME)
        return
    for name, content in files_beside(config, task, tokenizer_folder and Path(tokenizer_folder)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _write_index(path: Path, shards: list[list[PlannedTensor]], weight_map: dict[str, str]) -> None:
    tensors = [tensor for shard in shards for tensor in shard]
    metadata = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    index = {"metadata": metadata, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
