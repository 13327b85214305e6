"""Which format a file is in, by its first bytes; and which of the formats in a folder is read.

A name alone is never believed: a file whose name and content disagree is refused.
"""

from pathlib import Path

from conversion import safetensors_file
from conversion.formats import FORMATS, Format
from conversion.index import index_files
from opt_core.errors import CheckpointError

_INDEX_SUFFIX = ".index.json"
_PUBLISHED = ("safetensors", "torch-bin")
_LONGEST_MAGIC = 16
_CONTAINERS = {
    "safetensors": "safetensors",
    "torch-zip": "a zip as torch.save writes it",
    "msgpack": "msgpack as Flax writes it",
    "h5": "HDF5",
}

# File of a checkpoint that is not read (yet) -> what it is.
_FOREIGN_FILES = {
    "adapter_model.*": "a LoRA adapter: merge it into its base model first",
    "*.pt": "metaseq weights, which are not read yet",
}


def weight_files(folder: Path) -> tuple[Format, Path]:
    """The preferred format in a folder, and its single file or its index.

    Raises:
        CheckpointError: no weights, shards without an index, or a single file beside an index.
    """
    others: list[tuple[Format, Path]] = []
    for single_name, index_name in dict.fromkeys((f.single_name, f.index_name) for f in FORMATS.values()):
        single, index = folder / single_name, folder / index_name
        if single.is_file() and index.is_file():
            text = f"holds both {single.name} and {index.name}: name the one that is meant, or delete the other"
            raise CheckpointError(str(folder), [text])
        if single.is_file() or index.is_file():
            path = single if single.is_file() else index
            format = format_of(path)
            if format.name in _PUBLISHED:
                return format, path
            others.append((format, path))
    if not others:
        raise CheckpointError(str(folder), _why_there_are_no_weights(folder))
    return others[0]


def _why_there_are_no_weights(folder: Path) -> list[str]:
    names = dict.fromkeys(name for format in FORMATS.values() for name in (format.single_name, format.index_name))
    problems = [f"no weights: looked for {', '.join(names)}"]
    for index_name in dict.fromkeys(format.index_name for format in FORMATS.values()):
        owners = [format for format in FORMATS.values() if format.index_name == index_name]
        if any(owners[0].owns(path.name) for path in folder.iterdir()):
            problems.append(f"{index_name}: missing, though shards of it are there")
    for pattern, what in _FOREIGN_FILES.items():
        problems += [f"{path.name}: {what}" for path in sorted(folder.glob(pattern))[:3]]
    return problems


def format_of(path: Path) -> Format:
    """The format of a weight file or an index, by content; by name only where the content is damaged.

    Raises:
        CheckpointError: neither name nor content is known, or they disagree.
    """
    named = [f for f in FORMATS.values() if path.name.endswith((f.suffix, f.suffix + _INDEX_SUFFIX))]
    weights = _first_shard(path, named[0].suffix) if named and path.name.endswith(_INDEX_SUFFIX) else path
    container = _container_of(weights) if weights.is_file() else None
    if named and container not in (None, named[0].container):
        text = f"expected {_CONTAINERS[named[0].container]}, by its name, got {_CONTAINERS[container]}"
        raise CheckpointError(str(weights), [text])
    candidates = named or [format for format in FORMATS.values() if format.container == container]
    if not candidates:
        suffixes = ", ".join(dict.fromkeys(format.suffix for format in FORMATS.values()))
        raise CheckpointError(str(path), [f"expected a file that ends in one of {suffixes} (or such an index)"])
    if container == "safetensors":
        framework = safetensors_file.read_header(weights).metadata.get("format", "pt")
        candidates = [format for format in candidates if format.framework == framework] or candidates
    return candidates[0]


def _first_shard(index: Path, suffix: str) -> Path:
    return index.parent / min(index_files(index, suffix))


def _container_of(path: Path) -> str | None:
    """The container by its magic; None for what is none of those read, damaged files among them."""
    with open(path, "rb") as file:
        magic = file.read(_LONGEST_MAGIC)
    if magic.startswith(b"PK\x03\x04"):
        return "torch-zip"
    if magic.startswith(b"\x89HDF\r\n\x1a\n"):
        return "h5"
    if magic[8:9] == b"{":
        return "safetensors"
    return "msgpack" if _starts_a_map(magic) else None


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
