"""A checkpoint of any format in `conversion.formats`, opened without reading its weights: they come one by one.

Takes a folder (config.json and weights), one weight file, or an index. Writing is `conversion.write`; finding a
checkpoint on the hub is `conversion.hub`. No framework is imported.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conversion.assembly import find_weights
from conversion.containers import CONTAINERS, Container
from conversion.formats import Format
from conversion.names import task_of
from conversion.recognition import format_by_names, format_of, weight_files
from conversion.staging import check_is_published
from conversion.stored import TensorFile
from opt_core.config import CONFIG_NAME, OPTConfig
from opt_core.config import DTYPES as CONFIG_DTYPES
from opt_core.errors import CheckpointError
from opt_core.json_file import read_json_object
from opt_core.schema import check_shapes, shapes

_PUBLISHED_FIELDS = {"model_type", "hidden_size"}  # one of which every published config.json has
_MAPPED_BYTES = 1 << 28  # before the maps that `pieces` used are let go of
_BASE_CLASSES = {"OPTModel", "TFOPTModel"}

# Switches that explain missing or unexpected tensors, tried one at a time for a hint.
_MOST_EXPLAINED = 1000  # of problems; in OPT's largest a wrong switch makes 576
_SWITCHES = ("enable_bias", "layer_norm_elementwise_affine", "_remove_final_layer_norm", "tie_word_embeddings")


class Checkpoint:
    """The weights of one model on disk; a context manager.

    Attributes:
        source: the folder or file it was opened from.
        format: a key of `conversion.formats.FORMATS`.
        config: that of config.json, `torch_dtype` taken from the tensors where it has none.
        task: the class that saved it, one of `opt_core.schema.TASKS`, by the names present, or by the config's
            architectures where names do not tell a base model.
        shapes, dtypes: by the schema's names; a tied head is not among them.
        bytes_read: of weights, what has been asked of the files so far; a view counts as read.
    """

    def __init__(self, source: str, format: Format, config: OPTConfig, files: Sequence[TensorFile]):
        self.source, self.format, self.config = source, format.name, config
        self._files, self._viewed_bytes = files, 0
        self._stored = find_weights(files, format, config, source)
        self.bytes_read = 0
        self.task = task_of(stored.published for stored in self._stored.values())
        if not format.names_tell_the_class and _BASE_CLASSES & {*(config.architectures or ())}:
            self.task = "base"
        self.shapes = {name: stored.shape for name, stored in self._stored.items()}
        self.dtypes = {name: stored.dtype for name, stored in self._stored.items()}
        if config.torch_dtype is None:
            self.config = config.replace(torch_dtype=_most_common_dtype(self.dtypes))

    def read(self, name: str) -> np.ndarray:
        """One tensor by the schema's name: row-major, writable, in the stored dtype.

        bfloat16 comes as `ml_dtypes.bfloat16`. A view on a private memory map where its bytes lie in one aligned run of
        the file in this order, else a copy. Writing to it never reaches the file, but a later `read` may see it. It
        outlives `close`.
        """
        array = self._stored[name].read()
        self.bytes_read += array.nbytes
        return array

    def pieces(self, name: str) -> tuple[list[np.ndarray], int]:
        """One tensor for a single look: its pieces, and the axis along which they follow each other.

        They are views of any strides wherever a container allows, not to be written to. Unlike `read`, it lets go of
        the file's pages again, some hundred MB later, so that a process which passes through a checkpoint stays small.
        """
        pieces, axis = self._stored[name].pieces()
        self.bytes_read += sum(piece.nbytes for piece in pieces)
        self._viewed_bytes += sum(piece.nbytes for piece in pieces)
        if self._viewed_bytes > _MAPPED_BYTES:
            self.close()  # of which each array keeps what it needs
            self._viewed_bytes = 0
        return pieces, axis

    def views(self, name: str) -> tuple[list[np.ndarray], int]:
        """As `pieces`, of any alignment, and before anything is read where a container allows (`conversion.slices`)."""
        return self._stored[name].views()

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
        of the config that would explain them all, if one does (of thousands of problems it is none).
        """
        config, task = config or self.config, task or self.task
        may_lack, left_over = tuple(may_lack), set(may_have) - shapes(config, task).keys()
        found = {name: shape for name, shape in self.shapes.items() if name not in left_over}
        try:
            check_shapes(found, config, task, source=self.source, may_lack=may_lack)
        except CheckpointError as error:
            hints = _switch_hints(found, config, task, may_lack) if len(error.problems) < _MOST_EXPLAINED else []
            raise CheckpointError(self.source, [*error.problems, *hints]) from None

    def close(self) -> None:
        """Lets go of the files; arrays that were read stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def open_checkpoint(
    source: str | os.PathLike,
    *,
    config: OPTConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    verify: bool = False,
) -> Checkpoint:
    """Opens a local folder, weight file or index; reads headers and configs only.

    Args:
        source: a folder with weights (of several, published safetensors are preferred, then `.bin`), or one weight file
            or index.
        config: used instead of config.json, or of what the weights say in formats that bring a config of their own.
        overrides: fields of the config to replace, wherever it came from.
        verify: also reads everything once and compares it with the file's checksums, which `.bin`, metaseq and
            TensorFlow's checkpoints have.

    Raises:
        CheckpointError: lists what is wrong with the files, or says which files were looked for.
        ConfigError: config.json describes no OPT model.
    """
    path = Path(source)
    if not (path.is_dir() or path.is_file()):
        raise CheckpointError(str(path), ["no such file or folder"])
    check_is_published(path if path.is_dir() else path.parent)
    format, weights = weight_files(path) if path.is_dir() else (format_of(path), path)
    container = CONTAINERS[format.container]
    if config is None:
        config = _published_config(path, weights, container)
    if config is not None:
        config = config.replace(**overrides or {})
    opened = container.open(weights, format, config, verify)
    if config is None:
        assert opened.config is not None
        config = opened.config().replace(**overrides or {})
    return Checkpoint(str(path), format_by_names(format, opened.files), config, opened.files)


def _published_config(source: Path, weights: Path, container: Container) -> OPTConfig | None:
    """The config.json in the folder that was asked for, or else beside the weights; None where the files give a config.

    KerasHub and CTranslate2 have files of their own by that name.
    """
    folders = (source if source.is_dir() else source.parent, weights.parent)
    for path in dict.fromkeys(folder / CONFIG_NAME for folder in folders):
        if path.is_file() and (not container.has_config or _PUBLISHED_FIELDS & read_json_object(path).keys()):
            return OPTConfig.from_json(path)
    if not container.has_config:
        raise _missing_config(folders[0])
    return None


def _missing_config(folder: Path) -> CheckpointError:
    return CheckpointError(str(folder), [f"{CONFIG_NAME}: missing; put it beside the weights, or give a config"])


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
