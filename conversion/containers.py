"""The containers by name: how a checkpoint is opened and written in each, and whether its config comes with it.

A container knows bytes and stored names; what the names mean is `conversion.formats`' business. The modules of the
containers import the libraries they need when they are used.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from conversion import msgpack_file, safetensors_file
from conversion.ctranslate2 import ctranslate2_config, ctranslate2_file
from conversion.formats import FORMATS, Format, without_scope
from conversion.index import check_against_shards, read_index, warn_of_size
from conversion.keras import h5_file, keras_hub, keras_hub_weights
from conversion.metaseq import metaseq_checkpoint, metaseq_config
from conversion.orbax import orbax_folder
from conversion.pytorch import torch_zip
from conversion.safetensors_file import PlannedTensor
from conversion.stored import MappedFile, TensorFile
from conversion.tf_checkpoint import tensor_bundle
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError

ORBAX_NAME = FORMATS["orbax"].single_name
WriteTensor = Callable[[IO[bytes], PlannedTensor], None]


class Opened(NamedTuple):
    """The files of a checkpoint (where the format has them, its model-parallel parts in order), and their config."""

    files: Sequence[TensorFile]
    config: Callable[[], OPTConfig] | None = None


class Container(NamedTuple):
    """What is known of one.

    Attributes:
        described: in the words of an error about a file of another kind.
        open: (path of a file, an index or a folder, format, config if known, verify).
        has_config: True where the files say what model they hold; then a published config.json need not be there.
        write: (open file, tensors, write_tensor, format, options) writes one file of several tensors.
        write_folder: (folder, tensors, write_tensor) for a container that is no single file.
        files_beside: (config, task, folder of the tokenizer) to what lies beside the weights, name to content; None
            for the published config.json alone.
    """

    described: str
    open: Callable[[Path, Format, OPTConfig | None, bool], Opened]
    has_config: bool = False
    write: Callable[..., None] | None = None
    write_folder: Callable[..., None] | None = None
    files_beside: Callable[[OPTConfig, str, Path | None], dict[str, bytes]] | None = None


def _files(open_one: Callable[[Path, Format, bool], TensorFile]):
    """Opens a single file, or the shards of an index."""

    def open_files(path: Path, format: Format, config: OPTConfig | None, verify: bool) -> Opened:
        if path.suffix != ".json":
            return Opened([open_one(path, format, verify)])
        weight_map = read_index(path, format.suffix, first_may_be_empty=format.framework != "pt")
        shards = dict.fromkeys(weight_map.values())
        files = [open_one(path.parent / shard, format, verify) for shard in shards]
        stored = {file.path.name: [without_scope(format, name) for name in file.tensors] for file in files}
        indexed = {without_scope(format, name): shard for name, shard in weight_map.items()}
        check_against_shards(indexed, stored, str(path))
        warn_of_size(path, files)
        return Opened(files)

    return open_files


def _open_safetensors(path: Path, format: Format, verify: bool) -> TensorFile:
    header = safetensors_file.read_header(path)
    framework = header.metadata.get("format", "pt")
    if framework != format.framework:
        text = f"expected metadata with format {format.framework!r}, got {framework!r}"
        raise CheckpointError(str(path), [text])
    return MappedFile(path, header.tensors)


def _write_safetensors(file, tensors: Iterable[PlannedTensor], write_tensor: WriteTensor, format: Format, **_: Any):
    safetensors_file.write_file(file, tensors, write_tensor, framework=format.framework)


def _write_h5(file, tensors: Iterable[PlannedTensor], write_tensor: WriteTensor, format: Format, *, is_single: bool):
    h5_file.write_file(file, tensors, write_tensor, scope=format.scope if is_single else "")


def _open_metaseq(path: Path, format: Format, config: OPTConfig | None, verify: bool) -> Opened:
    opened = metaseq_checkpoint.open_parts(path, config, verify=verify)
    return Opened(opened.parts, lambda: metaseq_checkpoint.config_of(opened))


def _write_metaseq(file, tensors: Iterable[PlannedTensor], write_tensor: WriteTensor, config: OPTConfig, parts: int):
    metaseq_checkpoint.write_part(file, tensors, write_tensor, cfg=metaseq_config.cfg_of(config, parts))


def _open_ctranslate2(path: Path, *_: Any) -> Opened:
    file = ctranslate2_file.open_file(path)
    return Opened([file], lambda: ctranslate2_config.config_of(file, path.parent))


def _open_keras_hub(path: Path, *_: Any) -> Opened:
    is_index = path.suffix == ".json"
    files = keras_hub_weights.open_shards(path) if is_index else [keras_hub_weights.open_file(path)]
    return Opened(files, lambda: keras_hub.config_of(path))


def _keras_hub_files(config: OPTConfig, task: str, tokenizer_folder: Path | None) -> dict[str, bytes]:
    dtype = config.torch_dtype or "float32"
    return keras_hub.preset_files(config, dtype, task=task, tokenizer_folder=tokenizer_folder)


def _write_orbax(folder: Path, tensors: Iterable[PlannedTensor], write_tensor: WriteTensor) -> None:
    (folder / ORBAX_NAME).mkdir()
    orbax_folder.write_folder(folder / ORBAX_NAME, tensors, write_tensor)


def _plainly(write: Callable[..., None]) -> Callable[..., None]:
    """For containers whose files are the same in every format."""
    return lambda file, tensors, write_tensor, format, **_: write(file, tensors, write_tensor)


CONTAINERS = {
    "safetensors": Container("safetensors", _files(_open_safetensors), write=_write_safetensors),
    "torch-zip": Container(
        "a zip as torch.save writes it",
        _files(lambda path, _, verify: MappedFile(path, torch_zip.read_tensors(path, verify=verify))),
        write=_plainly(torch_zip.write_file),
    ),
    "msgpack": Container(
        "msgpack as Flax writes it",
        _files(lambda path, *_: msgpack_file.open_file(path)),
        write=_plainly(msgpack_file.write_file),
    ),
    "h5": Container("HDF5 as Keras 2 writes it", _files(lambda path, *_: h5_file.open_file(path)), write=_write_h5),
    "metaseq": Container(
        "a zip as torch.save writes it for metaseq", _open_metaseq, has_config=True, write=_write_metaseq
    ),
    "orbax": Container(
        "a folder that Orbax wrote",
        lambda path, *_: Opened([orbax_folder.open_folder(path)]),
        write_folder=_write_orbax,
    ),
    "tensor-bundle": Container(
        "the index of a TensorFlow checkpoint",
        lambda path, _, config, verify: Opened([tensor_bundle.open_file(path, verify=verify)]),
        write_folder=tensor_bundle.write_folder,
    ),
    "keras-h5": Container(
        "HDF5 as Keras 3 writes it",
        _open_keras_hub,
        has_config=True,
        write_folder=keras_hub_weights.write_folder,
        files_beside=_keras_hub_files,
    ),
    "ctranslate2": Container("model.bin of CTranslate2", _open_ctranslate2, has_config=True),
}
