"""Checkpoints of which every process writes its own parts, PyTorch: `torch.distributed.checkpoint` without pickles.

For runs whose weights and moments take too long to gather: nothing is gathered, and any other mesh reads its parts of
them. For everyone else `Trainer.save` writes what all backends and tools read. The files are safetensors, which
PyTorch's HuggingFaceStorageWriter makes; its other storage keeps a pickle beside the tensors (`.metadata`), which
reading would execute. `distributed.json`, written last, says what there must be.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from conversion.index import plan_shards
from conversion.safetensors_file import Header, read_header
from conversion.staging import sync_path
from opt_core.errors import CheckpointError, ConfigError, InputError, MissingFrameworkError, raise_if
from opt_core.json_file import read_json_object
from opt_core.optimization import Moments
from opt_core.schema import shapes
from opt_torch.processes import other_processes
from opt_torch.sharding import write_from_first
from opt_torch.training import Trainer

CONTENTS_NAME = "distributed.json"
FILE_BYTES = 2**28  # of a process: `safetensors` makes a file in memory, twice
_VERSION = 1
_MOMENTS = tuple(f"{kind}." for kind in Moments._fields)


def save_distributed(source, folder: str | os.PathLike) -> None:
    """Writes the weights of a model; of a Trainer also the moments, the number of steps and the seed.

    Every process of the mesh must call this. The folder, which they all reach, appears when all of it is on the disk.

    Raises:
        FileExistsError: there is such a folder already.
        InputError: the model has adapters.
        CheckpointError: what kept a process from writing, of each that failed.
        TrainingError: another process is gone.
    """
    model, folder, tensors = _model_of(source, "save_distributed"), Path(folder), _tensors(source)
    partial = folder.with_name(f".{folder.name}.tmp")
    processes = 1 if model.mesh is None else model.mesh.devices
    sizes = {name: x.numel() * x.element_size() // processes for name, x in tensors.items()}
    files = {name: number for number, names in enumerate(plan_shards(sizes, FILE_BYTES), 1) for name in names}
    with other_processes(model, _step_of(source)):
        _on_first(model, lambda: _begin(folder, partial))
        writer = _storage().HuggingFaceStorageWriter(str(partial), fqn_to_index_mapping=files, save_distributed=True)
        _together(checkpoint.save, model, tensors, folder, storage_writer=writer)
        _on_first(model, lambda: _publish(partial, folder, source))


@torch.no_grad()
def restore_distributed(target, folder: str | os.PathLike) -> None:
    """Reads what `save_distributed` wrote, on a mesh of any shape, or on none; each process reads its own parts.

    A model takes the weights of what a Trainer saved, and leaves the moments.

    Raises:
        CheckpointError: lists every file and tensor that is missing, unexpected, incomplete, or of another shape or
            dtype; nothing is changed then.
        InputError: the model has adapters.
        TrainingError: another process is gone.
    """
    model, folder, tensors = _model_of(target, "restore_distributed"), Path(folder), _tensors(target)
    contents = _read_contents(folder)
    stored = _stored_in(folder, contents["files"])
    if target is model:
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith(_MOMENTS)}
    raise_if(CheckpointError, str(folder), _tensor_problems(tensors, stored))
    with other_processes(model, _step_of(target)):
        reader = _storage().HuggingFaceStorageReader(str(folder))
        _together(checkpoint.load, model, tensors, folder, storage_reader=reader)
    if target is not model:
        target.go_on_at(contents["step"], contents["seed"])


def _model_of(source, what: str):
    model = source.model if isinstance(source, Trainer) else source
    if model.lora is not None:
        raise InputError(what, ["model: expected one without adapters, which are small: Trainer.save writes them"])
    return model


def _step_of(source) -> int | None:
    return source.step_count if isinstance(source, Trainer) else None


def _tensors(source) -> dict[str, Tensor]:
    """This process' parts, by the names in the files."""
    if not isinstance(source, Trainer):
        return {name: source.weight(name).detach() for name in shapes(source.config, source.task)}
    pairs = source.moments().items()
    return _tensors(source.model) | {f"{kind}.{name}": x for name, pair in pairs for kind, x in pair._asdict().items()}


def _storage():
    """PyTorch's storage of safetensors."""
    try:
        import safetensors  # noqa: F401
        from torch.distributed.checkpoint import hf_storage
    except ImportError as error:
        text = "distributed checkpoints need torch 2.9 or later and safetensors: pip install safetensors"
        raise MissingFrameworkError(f"{text} ({error})") from error
    return hf_storage


def _together(transfer: Callable, model, tensors: dict[str, Tensor], folder: Path, **storage) -> None:
    """Runs `checkpoint.save` or `load`; what failed on any process is one error on all."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said to everyone who has one process
            transfer(tensors, no_dist=model.mesh is None, **storage)
    except CheckpointException as error:
        failures = [f"process {rank}: {failure}" for rank, (failure, _) in error.failures.items()]
        raise CheckpointError(str(folder), failures) from error


# -- a folder that appears when it is whole ---------------------------------------------------------------------------


def _on_first(model, act: Callable[[], None]) -> None:
    """What process 0 does before any other goes on; its error reaches all."""
    if model.mesh is None:
        act()
    else:
        write_from_first(model.weight, lambda whole: act())


def _begin(folder: Path, partial: Path) -> None:
    if folder.exists():
        raise FileExistsError(f"{folder}: expected no such folder")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)


def _publish(partial: Path, folder: Path, source) -> None:
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    contents: dict[str, Any] = {"version": _VERSION, "files": files}
    if isinstance(source, Trainer):
        contents |= {"step": source.step_count, "seed": source.seed, "recipe": source.recipe.to_dict()}
    (partial / CONTENTS_NAME).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    for path in [*partial.iterdir(), partial]:
        sync_path(path)
    os.rename(partial, folder)
    sync_path(folder.absolute().parent)


# -- what lies in one -------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor of which the files have some parts."""

    shape: tuple[int, ...]  # that the parts span
    dtypes: set[str]
    parts: dict[tuple[int, ...], int]  # where each begins, and how many numbers it has


def _read_contents(folder: Path) -> dict[str, Any]:
    path = folder / CONTENTS_NAME
    if not path.is_file():
        raise CheckpointError(str(folder), [f"{CONTENTS_NAME}: missing; save_distributed writes it last"])
    try:
        contents = read_json_object(path)
    except ConfigError as error:
        raise CheckpointError(error.title, error.problems) from None
    raise_if(CheckpointError, str(path), _contents_problems(contents))
    raise_if(CheckpointError, str(folder), _file_problems(folder, contents["files"]))
    return contents


def _contents_problems(contents: Mapping[str, Any]) -> Iterator[str]:
    if contents.get("version") != _VERSION:
        yield f"version: expected {_VERSION}, got {str(contents.get('version'))[:100]}"
    for name in ("step", "seed"):
        if type(contents.get(name, 0)) is not int:
            yield f"{name}: expected an integer, got {str(contents[name])[:100]}"
    files = contents.get("files")
    if not isinstance(files, dict) or not all(type(size) is int for size in files.values()):
        yield f"files: expected the size of each, got {str(files)[:100]}"


def _file_problems(folder: Path, files: Mapping[str, int]) -> Iterator[str]:
    found = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    for name, size in files.items():
        if name not in found:
            yield f"{name}: missing"
        elif found[name] != size:
            yield f"{name}: expected {size} bytes, got {found[name]}"
    yield from (f"{name}: unexpected" for name in found if name not in files)


def _stored_in(folder: Path, files: Iterable[str]) -> dict[str, Stored]:
    """What the headers of the files say."""
    stored: dict[str, Stored] = {}
    for file in files:
        header = read_header(folder / file)
        begins = _begins(header, folder / file)
        for name, part in header.tensors.items():
            old = stored.get(name, Stored((0,) * len(part.shape), set(), {}))
            ends = (begin + length for begin, length in zip(begins[name], part.shape, strict=True))
            spanned = tuple(map(max, zip(old.shape, ends, strict=True)))
            parts = old.parts | {begins[name]: math.prod(part.shape)}
            stored[name] = Stored(spanned, old.dtypes | {part.dtype}, parts)
    return stored


def _begins(header: Header, path: Path) -> dict[str, tuple[int, ...]]:
    """Where the part of each tensor begins, which PyTorch writes beside them."""
    try:
        places = json.loads(header.metadata["DCP_SHARDING_INFO"])
        begins = {name: tuple(places[name]["saved_offsets"]) for name in header.tensors}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(str(path), [f"DCP_SHARDING_INFO: expected a place for each tensor ({error!r})"]) from None
    problems = [
        f"{name}: expected a place of {len(header.tensors[name].shape)} numbers, got {str(begin)[:100]}"
        for name, begin in begins.items()
        if len(begin) != len(header.tensors[name].shape) or not all(type(x) is int and x >= 0 for x in begin)
    ]
    raise_if(CheckpointError, str(path), problems)
    return begins


def _tensor_problems(tensors: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> Iterator[str]:
    for name, tensor in tensors.items():
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if name not in stored:
            yield f"{name}: missing, expected {shape}"
        elif stored[name].shape != shape:
            yield f"{name}: expected {shape}, got {stored[name].shape}"
        elif stored[name].dtypes != {dtype}:
            yield f"{name}: expected {dtype}, got {', '.join(sorted(stored[name].dtypes))}"
        elif (count := sum(stored[name].parts.values())) != math.prod(shape):
            yield f"{name}: expected parts of {math.prod(shape)} numbers, got {count}"
    yield from (f"{name}: unexpected, got {stored[name].shape}" for name in stored if name not in tensors)
