"""The formats, each a declaration: what its files are called, how each weight is named and laid out in them.

So far the published layout in its two containers.
"""

import re
from pathlib import Path
from typing import NamedTuple

from opt_core.errors import CheckpointError


class Format(NamedTuple):
    """A container, and the names of its files."""

    name: str
    stem: str  # of a single file; shards are `<stem>-00001-of-00002<suffix>`, their index `<stem><suffix>.index.json`
    suffix: str

    @property
    def single_name(self) -> str:
        return f"{self.stem}{self.suffix}"

    @property
    def index_name(self) -> str:
        return f"{self.stem}{self.suffix}.index.json"

    def owns(self, file_name: str) -> bool:
        """True for the names of files that this format writes: single, shard or index."""
        shard = rf"{re.escape(self.stem)}-\d+-of-\d+{re.escape(self.suffix)}"
        return file_name in (self.single_name, self.index_name) or re.fullmatch(shard, file_name) is not None


# In order of preference where a folder holds several.
FORMATS = {
    format.name: format
    for format in (Format("safetensors", "model", ".safetensors"), Format("torch-bin", "pytorch_model", ".bin"))
}

# File of a checkpoint that is not read (yet) -> what it is.
_FOREIGN_FILES = {
    "adapter_model.*": "a LoRA adapter: merge it into its base model first",
    "tf_model*.h5": "TensorFlow weights, which are not read yet",
    "flax_model*.msgpack": "Flax weights, which are not read yet",
    "*.pt": "metaseq weights, which are not read yet",
}


def weight_files(folder: Path) -> tuple[Format, Path]:
    """The preferred format in a folder, and its single file or its index.

    Raises:
        CheckpointError: no weights, shards without an index, or a single file beside an index.
    """
    for format in FORMATS.values():
        single, index = folder / format.single_name, folder / format.index_name
        if single.is_file() and index.is_file():
            text = f"holds both {single.name} and {index.name}: name the one that is meant, or delete the other"
            raise CheckpointError(str(folder), [text])
        if single.is_file() or index.is_file():
            return format, single if single.is_file() else index
    raise CheckpointError(str(folder), _why_there_are_no_weights(folder))


def _why_there_are_no_weights(folder: Path) -> list[str]:
    names = [name for format in FORMATS.values() for name in (format.single_name, format.index_name)]
    problems = [f"no weights: looked for {', '.join(names)}"]
    for format in FORMATS.values():
        if any(format.owns(path.name) for path in folder.iterdir()):
            problems.append(f"{format.index_name}: missing, though shards of it are there")
    for pattern, what in _FOREIGN_FILES.items():
        problems += [f"{path.name}: {what}" for path in sorted(folder.glob(pattern))[:3]]
    return problems
