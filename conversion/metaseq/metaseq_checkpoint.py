"""metaseq's checkpoints in every layout: opened as model-parallel parts of named tensors, and written part by part.

A part comes from one file, or from the shards of fully sharded training; its tensors are named, or lie in flat tensors
(`metaseq_flat`). Which files belong together is `metaseq_files`' business, what parts must agree in `metaseq_parts`',
what the stored settings mean `metaseq_config`'s. Putting the parts together, and the keys, values and queries apart, is
not done here. Neither metaseq nor omegaconf nor torch is imported, and nothing in a file is executed (`torch_records`).
Sources: metaseq f2cd367 (May 2022) and f7ffa5f (June 2023), `checkpoint_utils.py`, `scripts/reshard_fsdp.py`,
`scripts/reshard_mp.py`, `scripts/convert_to_singleton.py`.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from conversion.metaseq import metaseq_flat
from conversion.metaseq.metaseq_config import APART, JOINT, config_of_settings, is_model_parallel, settings_of
from conversion.metaseq.metaseq_files import files_of
from conversion.metaseq.metaseq_flat import ROOT, Group, Shard, is_flat
from conversion.metaseq.metaseq_parts import check_parts, without_leftover_head, without_nested_layers
from conversion.pytorch import torch_zip
from conversion.pytorch.torch_records import plain
from conversion.safetensors_file import PlannedTensor
from conversion.stored import DTYPES, MappedFile
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, raise_if

VERSION = "decoder.version"  # of the module's names, 3 since before OPT; no weight


class Metaseq(NamedTuple):
    """An opened checkpoint.

    `parts` holds one file-like object per model-parallel part, in order, all with the same tensors of the same shapes;
    a tensor's name is metaseq's. `settings` are those of the model, None where the files have none. `unknown` lists
    the names that the pickles ask for in branches that were passed over (optimizer, data, ...); none was imported.
    """

    source: Path
    parts: list[MappedFile]
    settings: dict[str, Any] | None
    unknown: tuple[str, ...]


class _Stored(NamedTuple):
    """What one file holds."""

    shard: Shard
    settings: dict[str, Any] | None
    metadata: Any
    unknown: tuple[str, ...]


def open_parts(path: Path, config: OPTConfig | None = None, *, verify: bool = False) -> Metaseq:
    """Opens a folder, or the set of files that `path` is one of; reads no weights unless `verify`.

    Args:
        config: used for flat files without metadata instead of the settings in them, which then need not be readable.
        verify: also compares every byte with the checksums of the files.

    Raises:
        CheckpointError: lists what is missing, damaged, contradictory or unknown, by file and tensor.
        ConfigError: the settings of a flat file describe no model.
    """
    stored = [[_read(file, config is None, verify) for file in shards] for shards in files_of(path)]
    settings = stored[0][0].settings
    names = [name for part in stored for one in part for name in one.shard.tensors]
    if not is_flat(names):
        parts = [_named_part(part) for part in stored]
    elif any(one.metadata is not None for part in stored for one in part):
        parts = [_part_by_metadata(part) for part in stored]
    else:
        parts = _parts_by_config(stored, config, path)
    parts = [without_nested_layers(part) for part in parts]
    check_parts(parts, path)
    parts = without_leftover_head(parts, path)
    unknown = dict.fromkeys(name for part in stored for one in part for name in one.unknown)
    return Metaseq(path, parts, settings, tuple(unknown))


def config_of(opened: Metaseq) -> OPTConfig:
    """The config by the stored settings and the shapes of the tensors.

    Raises:
        CheckpointError: settings are missing, contradict the tensors, or are of a model that is no OPT.
        ConfigError: the sizes are of no model.
    """
    shapes = {name: tensor.shape for name, tensor in opened.parts[0].tensors.items()}
    return config_of_settings(opened.settings, shapes, len(opened.parts), str(opened.source))


# -- one file ---------------------------------------------------------------------------------------------------------


def _read(path: Path, needs_settings: bool, verify: bool) -> _Stored:
    records = torch_zip.read_records(path, verify=verify)
    branches = records.content
    if not isinstance(branches.get("model"), dict):  # a state dict alone was passed around too
        branches = {"model": branches}
    problems: list[str] = []
    model, metadata = (plain(branches.get(name), name, problems) for name in ("model", "shard_metadata"))
    of_settings: list[str] = []
    cfg, args = (plain(branches.get(name), name, of_settings) for name in ("cfg", "args"))
    if of_settings and needs_settings:
        problems += [*of_settings, "the settings in cfg are not plain data: give a config if the rest is in order"]
    raise_if(CheckpointError, str(path), problems)
    tensors = records.locate(model)
    tensors.pop(VERSION, None)
    return _Stored(Shard(path, tensors), None if of_settings else settings_of(cfg, args), metadata, records.unknown)


# -- one part ---------------------------------------------------------------------------------------------------------


def _named_part(part: list[_Stored]) -> MappedFile:
    """A part in one file, by name. Its `shard_metadata`, if any, is that of before it was made."""
    if len(part) > 1:
        text = f"expected flat tensors in {len(part)} shards, got named ones"
        raise CheckpointError(str(part[0].shard.path), [text])
    return MappedFile(*part[0].shard)


def _part_by_metadata(part: list[_Stored]) -> MappedFile:
    source = str(part[0].shard.path)
    groups = metaseq_flat.groups_of_metadata([one.metadata for one in part], source)
    return metaseq_flat.cut([one.shard for one in part], groups, source)


def _parts_by_config(stored: list[list[_Stored]], config: OPTConfig | None, path: Path) -> list[MappedFile]:
    first = stored[0][0]
    if config is None:
        config = _flat_config(stored[0], len(stored), path)
    groups = _flat_groups(first, config, len(stored), path)
    made = []
    for part in stored:
        shards = [one.shard for one in part]
        made.append(metaseq_flat.cut(shards, metaseq_flat.padded(groups, shards), str(shards[0].path)))
    return made


def _flat_config(part: list[_Stored], parts: int, path: Path) -> OPTConfig:
    """The config by the settings alone; the vocabulary is what is left of the flat tensor."""
    first, smallest = part[0], 8 * parts
    config = config_of_settings(first.settings, {}, parts, str(path), vocab_size=smallest)
    needed = next(group.size for group in _flat_groups(first, config, parts, path) if group.key == ROOT)
    roots = [one.shard.tensors[ROOT].shape for one in part if ROOT in one.shard.tensors]
    held = sum(shape[0] for shape in roots if len(shape) == 1)
    more, left = divmod(held - needed, config.word_embed_proj_dim)
    vocabulary = smallest + more * parts
    if left >= len(part) or more < 0 or vocabulary % 8:  # metaseq pads every dictionary to a multiple of 8
        text = f"{ROOT}: expected {needed} elements and a multiple of 8 rows more of {config.word_embed_proj_dim}"
        raise CheckpointError(str(path), [f"{text}, by the settings in cfg, got {held}"])
    return config.replace(vocab_size=vocabulary)


def _flat_groups(first: _Stored, config: OPTConfig, parts: int, path: Path) -> list[Group]:
    sizes = {"vocab_size": config.vocab_size, "num_attention_heads": config.num_attention_heads}
    problems = [
        f"{field}: expected a multiple of {parts} parts, got {size}"
        for field, size in {**sizes, "ffn_dim": config.ffn_dim}.items()
        if size % parts
    ]
    joint = is_model_parallel(first.settings, parts)
    if joint is None and config.do_layer_norm_before and config.enable_bias:
        problems.append("cfg.model.arch: missing, without which the order of keys, values and queries is not known")
    if not config.tie_word_embeddings:
        problems.append("tie_word_embeddings: expected True for flat tensors without metadata, got False")
    raise_if(CheckpointError, str(path), problems)
    return metaseq_flat.groups_of_config(set(first.shard.tensors), config, parts, joint=bool(joint))


# -- writing ----------------------------------------------------------------------------------------------------------


def write_part(
    file: BinaryIO,
    tensors: Iterable[PlannedTensor],
    write_tensor: Callable[[IO[bytes], PlannedTensor], None],
    *,
    cfg: Mapping[str, Any],
) -> None:
    """Writes one model-parallel part as metaseq saves an unflattened one; calls `write_tensor(file, tensor)` for each.

    Args:
        tensors: by metaseq's names, of the shapes in this part; `decoder.version` is added.
        write_tensor: must write exactly `tensor.nbytes` bytes.
        cfg: of `metaseq_config.cfg_of`; its arch becomes that of the class which has tensors of these names.
    """
    planned = list(tensors)
    version = PlannedTensor(VERSION, planned[0].dtype if planned else "float32", (1,))

    def write(member: IO[bytes], tensor: PlannedTensor) -> None:
        if tensor is version:
            member.write(np.array([3], DTYPES[version.dtype]).tobytes())
        else:
            write_tensor(member, tensor)

    arch = JOINT if any("qkv_proj" in tensor.name for tensor in planned) else APART
    model = Namespace(**{**vars(cfg["model"]), "arch": arch, "_name": arch})
    torch_zip.write_file(
        file, [version, *planned], write, beside={"cfg": {**cfg, "model": model}, **_STATE_OF_TRAINING}
    )


# What metaseq looks for in any checkpoint before it builds a model (`checkpoint_utils._upgrade_state_dict`).
_STATE_OF_TRAINING: dict[str, Any] = {
    "args": None,
    "optimizer_history": [{"criterion_name": "", "lr_scheduler_state": {}, "num_updates": 0}],
    "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
}
