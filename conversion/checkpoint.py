"""A checkpoint of any format in `conversion.formats`, opened without reading its weights: they come one by one.

Takes a folder (config.json and weights), one weight file, or an index. Writing is `conversion.write`; finding a
checkpoint on the hub is `conversion.hub`. No framework is imported.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conversion import h5_file, msgpack_file, safetensors_file, torch_zip
from conversion.formats import Format, layout_of, published_of, without_scope
from conversion.index import check_against_shards, read_index
from conversion.layout import Layout, schema_shape, stored_shape, to_schema
from conversion.names import canonical_names, task_of
from conversion.recognition import format_of, weight_files
from conversion.stored import DTYPES, MappedFile, StoredTensor
from opt_core.config import CONFIG_NAME, OPTConfig
from opt_core.config import DTYPES as CONFIG_DTYPES
from opt_core.errors import CheckpointError, raise_if
from opt_core.schema import SCHEMA, check_shapes, shapes

_EMBEDDING = "decoder.embed_tokens.weight"
_HEAD = next(row.name for row in SCHEMA if row.tied_to == _EMBEDDING)
_COMPARED_BYTES = 1 << 24
_BASE_CLASSES = {"OPTModel", "TFOPTModel"}

# Switches that explain missing or unexpected tensors, tried one at a time for a hint.
_SWITCHES = ("enable_bias", "layer_norm_elementwise_affine", "_remove_final_layer_norm", "tie_word_embeddings")


class _Stored(NamedTuple):
    """One weight: the file it is in, its name there, and how it is laid out."""

    file: MappedFile
    name: str
    layout: Layout
    published: str

    @property
    def tensor(self) -> StoredTensor:
        return self.file.tensors[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return schema_shape(self.tensor.shape, self.layout)

    def read(self) -> np.ndarray:
        if self.layout.is_identity:
            return self.file.read(self.name)
        if self.tensor.shape != stored_shape(self.layout):
            text = f"{self.name}: expected {stored_shape(self.layout)}, got {self.tensor.shape}"
            raise CheckpointError(str(self.file.path), [text])
        return np.ascontiguousarray(to_schema(self.file.read(self.name), self.layout))


class Checkpoint:
    """The weights of one model on disk; a context manager.

    Attributes:
        source: the folder or file it was opened from.
        format: a key of `conversion.formats.FORMATS`.
        config: that of config.json, `torch_dtype` taken from the tensors where it has none.
        task: the class that saved it, one of `opt_core.schema.TASKS`, by the names present, or by the config's
            architectures where names do not tell a base model.
        shapes, dtypes: by the schema's names; a tied head is not among them.
    """

    def __init__(self, source: str, format: Format, config: OPTConfig, files: list[MappedFile]):
        self.source, self.format, self.config = source, format.name, config
        self._stored = _find_weights_in(files, format, config, source)
        self.task = task_of(stored.published for stored in self._stored.values())
        if not format.names_tell_the_class and _BASE_CLASSES & {*(config.architectures or ())}:
            self.task = "base"
        self.shapes = {name: stored.shape for name, stored in self._stored.items()}
        self.dtypes = {name: stored.tensor.dtype for name, stored in self._stored.items()}
        if config.torch_dtype is None:
            self.config = config.replace(torch_dtype=_most_common_dtype(self.dtypes))

    def read(self, name: str) -> np.ndarray:
        """One tensor by the schema's name: row-major, writable, in the stored dtype.

        bfloat16 comes as `ml_dtypes.bfloat16`. A view on a private memory map where its bytes lie in one aligned run of
        the file in this order, else a copy. Writing to it never reaches the file, but a later `read` may see it. It
        outlives `close`.
        """
        return self._stored[name].read()

    def check(
        self,
        config: OPTConfig | None = None,
        task: str | None = None,
        may_lack: Iterable[str] = (),
        may_have: Iterable[str] = (),
    ) -> None:
        """Raises one CheckpointError unless the tensors are exactly those of `config` and `task`, by default its own.

        `may_lack` names weights that may be absent, such as a new head; `may_have` those that may be left over, such as
        the head of another class. The error lists every missing, unexpected and mis-shaped tensor, and names the switch
        of the config that would explain them all, if one does.
        """
        config, task = config or self.config, task or self.task
        may_lack, left_over = tuple(may_lack), set(may_have) - shapes(config, task).keys()
        found = {name: shape for name, shape in self.shapes.items() if name not in left_over}
        try:
            check_shapes(found, config, task, source=self.source, may_lack=may_lack)
        except CheckpointError as error:
            hints = _switch_hints(found, config, task, may_lack)
            raise CheckpointError(self.source, [*error.problems, *hints]) from None

    def close(self) -> None:
        """Lets go of the files; arrays that were read stay valid."""
        for stored in self._stored.values():
            stored.file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def open_checkpoint(source: str | os.PathLike, *, config: OPTConfig | None = None, verify: bool = False) -> Checkpoint:
    """Opens a local folder, weight file or index; reads headers and config.json only.

    Args:
        source: a folder with config.json and weights (of several, published safetensors are preferred, then `.bin`), or
            one weight file or index.
        config: used instead of config.json.
        verify: also reads everything once and compares it with the file's checksums, which only `.bin` has.

    Raises:
        CheckpointError: lists what is wrong with the files, or says which files were looked for.
        ConfigError: config.json describes no OPT model.
    """
    path = Path(source)
    format, weights = _find_weights(path)
    if config is None:
        config = read_config(path)
    if weights.suffix == ".json":
        files = _open_shards(weights, format, verify)
    else:
        files = [_open_file(weights, format, verify)]
    return Checkpoint(str(path), format, config, files)


def _find_weights(path: Path) -> tuple[Format, Path]:
    if path.is_dir():
        return weight_files(path)
    if not path.is_file():
        raise CheckpointError(str(path), ["no such file or folder"])
    return format_of(path), path


def read_config(source: Path) -> OPTConfig:
    """The config.json of a folder, or that beside a weight file."""
    folder = source if source.is_dir() else source.parent
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(str(folder), [f"{CONFIG_NAME}: missing; put it beside the weights, or give a config"])
    return OPTConfig.from_json(folder / CONFIG_NAME)


def _open_file(path: Path, format: Format, verify: bool) -> MappedFile:
    if format.container == "torch-zip":
        return MappedFile(path, torch_zip.read_tensors(path, verify=verify))
    if format.container == "msgpack":
        return msgpack_file.open_file(path)
    if format.container == "h5":
        return h5_file.open_file(path)
    header = safetensors_file.read_header(path)
    framework = header.metadata.get("format", "pt")
    if framework != format.framework:
        text = f"expected metadata with format {format.framework!r}, got {framework!r}"
        raise CheckpointError(str(path), [text])
    return MappedFile(path, header.tensors)


def _open_shards(index: Path, format: Format, verify: bool) -> list[MappedFile]:
    weight_map = read_index(index, format.suffix, first_may_be_empty=format.framework != "pt")
    files = [_open_file(index.parent / shard, format, verify) for shard in dict.fromkeys(weight_map.values())]
    stored = {file.path.name: [without_scope(format, name) for name in file.tensors] for file in files}
    check_against_shards({without_scope(format, name): shard for name, shard in weight_map.items()}, stored, str(index))
    return files


def _find_weights_in(files: list[MappedFile], format: Format, config: OPTConfig, source: str) -> dict[str, _Stored]:
    """By canonical name, a tied head left out."""
    tensors = {stored: (file, tensor) for file in files for stored, tensor in file.tensors.items()}
    published = {stored: published_of(format, stored) for stored in tensors}
    stored_of = {name: stored for stored, name in published.items() if name}
    found, problems = canonical_names(stored_of)
    problems += [
        f"{name}: stored twice, as {stored} and as {stored_of[name]}"
        for stored, name in published.items()
        if name and stored_of[name] != stored
    ]
    problems += [
        f"{stored[:200]}: not a weight of OPT in {format.name}" for stored, name in published.items() if name is None
    ]
    problems += [
        f"{stored}: expected a dtype of {', '.join(DTYPES)}, got {tensor.dtype}"
        for stored, (_, tensor) in tensors.items()
        if tensor.dtype not in DTYPES
    ]
    raise_if(CheckpointError, source, problems)
    weights = {
        name: _Stored(tensors[stored_of[known]][0], stored_of[known], layout_of(format, name, config), known)
        for name, known in found.items()
    }
    if config.tie_word_embeddings and _HEAD in weights:
        weights = _without_tied_head(weights, source)
    return weights


def _without_tied_head(weights: dict[str, _Stored], source: str) -> dict[str, _Stored]:
    head = weights.pop(_HEAD)
    embedding = weights.setdefault(_EMBEDDING, head)  # safetensors' save_model keeps one name of the two
    if not _same_values(embedding, head):
        text = f"{_HEAD}: expected the values of {_EMBEDDING}, to which the config ties it, got others"
        raise CheckpointError(source, [f"{text}; a config with tie_word_embeddings=false keeps both"])
    return weights


def _same_values(a: _Stored, b: _Stored) -> bool:
    if a.file is b.file and a.tensor == b.tensor and a.layout == b.layout:
        return True
    if (a.tensor.dtype, a.shape) != (b.tensor.dtype, b.shape):
        return False
    a_bytes, b_bytes = (stored.read().reshape(-1).view(np.uint8) for stored in (a, b))
    starts = range(0, a_bytes.size, _COMPARED_BYTES)
    return all(np.array_equal(a_bytes[i : i + _COMPARED_BYTES], b_bytes[i : i + _COMPARED_BYTES]) for i in starts)


def _most_common_dtype(dtypes: dict[str, str]) -> str | None:
    common = Counter(dtypes.values()).most_common(1)
    return common[0][0] if common and common[0][0] in CONFIG_DTYPES else None


def _switch_hints(found: dict, config: OPTConfig, task: str, may_lack: tuple[str, ...]) -> list[str]:
    hints = []
    for switch in _SWITCHES:
        other = config.replace(**{switch: not getattr(config, switch)})
        try:
            check_shapes(found, other, task, source="", may_lack=may_lack)
        except CheckpointError:
            continue
        hints.append(f"the tensors are those of a config with {switch}={str(getattr(other, switch)).lower()}")
    return hints
