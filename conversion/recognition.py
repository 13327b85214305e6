"""Which format a file is in, by its first bytes; and which of the formats in a folder is read.

A name alone is never believed: a file whose name and content disagree is refused.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from conversion import safetensors_file
from conversion.containers import CONTAINERS
from conversion.ctranslate2 import ctranslate2_file
from conversion.formats import FORMATS, Format, published_of
from conversion.index import index_files
from conversion.keras import keras_hub_weights
from conversion.names import canonical_name, is_weight_name
from conversion.orbax import orbax_tree
from conversion.pytorch import torch_zip
from conversion.stored import TensorFile
from conversion.tf_checkpoint import sstable, tensor_bundle
from opt_core.errors import CheckpointError

_INDEX_SUFFIX = ".index.json"
_PUBLISHED = ("safetensors", "torch-bin")
_LONGEST_MAGIC = 32
_ORBAX_FILES = (orbax_tree.METADATA, orbax_tree.CHECKPOINT_METADATA)
_CT2_SPEC = ctranslate2_file.SPECIFICATION.encode() + b"\0"

# File of a checkpoint that is not read -> what it is.
_FOREIGN_FILES = {"adapter_model.*": "a LoRA adapter: merge it, or use load_adapter"}


def weight_files(folder: Path) -> tuple[Format, Path]:
    """The preferred format in a folder, and its single file, its index, or the folder that it fills.

    Raises:
        CheckpointError: no weights, shards without an index, or a single file beside an index.
    """
    others: list[tuple[Format, Path]] = []
    for path in _single_files_and_indexes(folder):
        format = format_of(path)
        if format.name in _PUBLISHED:
            return format, path
        others.append((format, path))
    if others:
        return others[0]
    for name, find in _FINDERS.items():
        if (place := find(folder)) is not None:
            return FORMATS[name], place
    raise CheckpointError(str(folder), _why_there_are_no_weights(folder))


def _sharded_formats() -> list[Format]:
    return [format for format in FORMATS.values() if format.has_shards]


def _single_files_and_indexes(folder: Path) -> list[Path]:
    found = []
    for single_name, index_name in dict.fromkeys((f.single_name, f.index_name) for f in _sharded_formats()):
        present = [path for path in (folder / single_name, folder / index_name) if path.is_file()]
        if len(present) > 1:
            text = f"holds both {single_name} and {index_name}: name the one that is meant, or delete the other"
            raise CheckpointError(str(folder), [text])
        found += present
    return found


def _why_there_are_no_weights(folder: Path) -> list[str]:
    names = dict.fromkeys(name for format in _sharded_formats() for name in (format.single_name, format.index_name))
    others = (
        "metaseq's .pt files, an Orbax or TensorFlow checkpoint, a SavedModel, a KerasHub preset, CTranslate2's model"
    )
    problems = [f"no weights: looked for {', '.join(names)}, {others}"]
    for index_name in dict.fromkeys(format.index_name for format in _sharded_formats()):
        owners = [format for format in _sharded_formats() if format.index_name == index_name]
        if any(owners[0].owns(path.name) for path in folder.iterdir()):
            problems.append(f"{index_name}: missing, though shards of it are there")
    for pattern, what in _FOREIGN_FILES.items():
        problems += [f"{path.name}: {what}" for path in sorted(folder.glob(pattern))[:3]]
    return problems


# -- folders that are no single file or index ---------------------------------------------------------------------


def _find_orbax(folder: Path) -> Path | None:
    inner = folder / FORMATS["orbax"].single_name
    return next((path for path in (inner, folder) if path.is_dir() and _is_orbax(path)), None)


def _is_orbax(folder: Path) -> bool:
    """True for a checkpoint, a step of CheckpointManager, or a folder of steps."""
    patterns = (f"{below}{name}" for below in ("", "*/", "*/*/") for name in _ORBAX_FILES)  # */*: items of steps
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _find_keras_hub(folder: Path) -> Path | None:
    names = (keras_hub_weights.WEIGHTS_NAME, keras_hub_weights.INDEX_NAME)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _find_saved_model(folder: Path) -> Path | None:
    path = folder / "variables" / "variables.index"
    return path if (folder / "saved_model.pb").is_file() and path.is_file() else None


def _find_tf_checkpoint(folder: Path) -> Path | None:
    found = [path for path in sorted(folder.glob("*.index")) if "tensor-bundle" in _containers_of(path)]
    if len(found) > 1 and (latest := tensor_bundle.latest_index(folder)):
        return latest
    if len(found) > 1:
        text = f"holds several checkpoints, {', '.join(path.name for path in found[:5])}: name the one that is meant"
        raise CheckpointError(str(folder), [text])
    return found[0] if found else None


def _find_ctranslate2(folder: Path) -> Path | None:
    path = folder / "model.bin"
    return path if path.is_file() and "ctranslate2" in _containers_of(path) else None


def _find_pt(folder: Path) -> Path | None:
    found = [path for path in folder.glob("*.pt") if path.is_file()]
    return found[0] if len(found) == 1 and "torch-zip" in _containers_of(found[0]) else None


def _find_metaseq(folder: Path) -> Path | None:
    return folder if any(path.is_file() for path in folder.glob("*.pt")) else None


_FINDERS: dict[str, Callable[[Path], Path | None]] = {
    "orbax": _find_orbax,
    "saved-model": _find_saved_model,
    "tf-checkpoint": _find_tf_checkpoint,
    "keras-hub": _find_keras_hub,
    "ctranslate2": _find_ctranslate2,
    "torch-pt": _find_pt,
    "metaseq": _find_metaseq,
}


# -- files ------------------------------------------------------------------------------------------------------------


def format_of(path: Path) -> Format:
    """The format of a weight file or an index, by content; by name only where the content is damaged.

    Raises:
        CheckpointError: neither name nor content is known, or they disagree.
    """
    if path.name.endswith(".weights.json"):
        return FORMATS["keras-hub"]
    named = [f for f in FORMATS.values() if f.suffix and path.name.endswith((f.suffix, f.suffix + _INDEX_SUFFIX))]
    weights = _first_shard(path, named[0].suffix) if named and path.name.endswith(_INDEX_SUFFIX) else path
    containers = _containers_of(weights) if weights.is_file() else ()
    candidates = [format for format in named or FORMATS.values() if format.container in containers]
    if named and containers and not candidates:
        expected, got = (CONTAINERS[name].described for name in (named[0].container, containers[0]))
        raise CheckpointError(str(weights), [f"expected {expected}, by its name, got {got}"])
    if not (candidates or named):
        suffixes = ", ".join(dict.fromkeys(format.suffix for format in FORMATS.values() if format.suffix))
        raise CheckpointError(str(path), [f"expected a file that ends in one of {suffixes} (or such an index)"])
    if "safetensors" in containers:
        framework = safetensors_file.read_header(weights).metadata.get("format", "pt")
        candidates = [format for format in candidates if format.framework == framework] or candidates
    return (candidates or named)[0]


def format_by_names(format: Format, files: Sequence[TensorFile]) -> Format:
    """Of the formats in the same files as `format`, the one whose table knows most of the names in them."""
    names = [name for file in files for name in file.tensors]
    alike = [it for it in FORMATS.values() if (it.container, it.framework) == (format.container, format.framework)]
    return max([format, *alike], key=lambda it: sum(_knows(it, name) for name in names))


def _knows(format: Format, stored: str) -> bool:
    names = published_of(format, stored)
    return bool(names) and all(is_weight_name(canonical_name(name)) for name in names)


def _first_shard(index: Path, suffix: str) -> Path:
    return index.parent / min(index_files(index, suffix))


def _containers_of(path: Path) -> tuple[str, ...]:
    """The containers that a file may be, by its magic; none for what is not read, damaged files among them."""
    if not path.is_file():  # of a pipe, the first bytes might never come
        return ()
    with open(path, "rb") as file:
        magic = file.read(_LONGEST_MAGIC)
        file.seek(max(0, path.stat().st_size - len(sstable.MAGIC)))
        end = file.read()
    if end == sstable.MAGIC:
        return ("tensor-bundle",)
    if magic.startswith(b"PK\x03\x04") and path.name.endswith(".keras"):
        return ("keras-h5",)
    if magic.startswith(b"PK\x03\x04"):
        return ("torch-zip",) if not path.name.endswith(".pt") or _has_published_names(path) else ("metaseq",)
    if magic.startswith(b"\x89HDF\r\n\x1a\n"):
        return (_container_of_hdf5(path),)
    if magic[8:9] == b"{":
        return ("safetensors",)
    if magic[6:].startswith(_CT2_SPEC):
        return ("ctranslate2",)
    return ("msgpack",) if _starts_a_map(magic) else ()


def _container_of_hdf5(path: Path) -> str:
    """Keras 2 lists the layers in an attribute; a damaged file goes by its name."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return "h5" if {"layer_names", "layer_names0"} & file.attrs.keys() else "keras-h5"
    except Exception:  # h5py raises what HDF5 reports as one of half a dozen types
        return "keras-h5" if path.name.endswith(".weights.h5") else "h5"


def _has_published_names(path: Path) -> bool:
    """True for a plain state dict of published names, as `torch.save(model.state_dict(), path)` writes it."""
    try:
        return all(is_weight_name(canonical_name(name)) for name in torch_zip.read_tensors(path))
    except CheckpointError:
        return False


def _starts_a_map(magic: bytes) -> bool:
    """A msgpack map with a first key that is a short text, or an empty one alone; not a pickle (0x80 and a version)."""
    if magic == b"\x80":
        return True
    if magic[:1] == b"\xde":
        return _starts_a_text(magic[3:])
    if magic[:1] == b"\xdf":
        return _starts_a_text(magic[5:])
    return b"\x81" <= magic[:1] <= b"\x8f" and _starts_a_text(magic[1:])


def _starts_a_text(magic: bytes) -> bool:
    return b"\xa1" <= magic[:1] <= b"\xbf" or magic[:1] == b"\xd9"
