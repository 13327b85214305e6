"""metaseq's flat tensors: where in them each weight lies, across the shards of one model-parallel part.

Fully sharded training joins the weights of a group (a layer, or what is in no layer) to one long tensor and cuts it
into equal shards, the last ones padded. What is in it and in which order says `shard_metadata`; the files of May 2022
lack it, as does what `reshard_mp` then wrote, and the order is that in which the modules were made.
Sources: fairscale 0.4.6, `FullyShardedDataParallel` (`_get_shard`, `local_metadata_dict`, `consolidate_shard_weights`);
metaseq f2cd367 (2022), the constructors of `TransformerDecoder`, `TransformerDecoderLayer` and `MultiheadAttention`;
metaseq 13351b2, `scripts/reshard_mp.py`; issues #125, #610, #691, #695.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conversion.pytorch.torch_pickle import outline
from conversion.stored import DTYPES, MappedFile, StoredTensor
from opt_core.config import POSITION_OFFSET, OPTConfig
from opt_core.errors import CheckpointError, raise_if

ROOT = "flat_param_0"
_MAX_DIMENSIONS = 8
Shape = tuple[int, ...]


class Shard(NamedTuple):
    path: Path
    tensors: dict[str, StoredTensor]


class Group(NamedTuple):
    """Weights that lie one after the other in a flat tensor."""

    key: str  # of the flat tensor in every shard
    shapes: dict[str, Shape]  # full names, in order
    paddings: tuple[int, ...]  # elements at the end of each shard that belong to no weight

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes.values()))


def is_flat(names) -> bool:
    return any(name.rpartition(".")[2].startswith("flat_param_") for name in names)


# -- what is in a group, by its metadata ------------------------------------------------------------------------------


def groups_of_metadata(metadata: list[Any], source: str) -> list[Group]:
    """The groups by `shard_metadata` of every shard of a part, which may differ in padding alone.

    Raises:
        CheckpointError: lists what in the metadata contradicts itself.
    """
    problems: list[str] = []
    by_shard = []
    for number, one in enumerate(metadata):
        entries = list(_entries(one))
        problems += [f"shard {number}: shard_metadata{text}" for text in map(_entry_problem, entries) if text]
        by_shard.append(entries)
    raise_if(CheckpointError, source, problems[:20])
    for number, entries in enumerate(by_shard):
        if [_without_padding(entry) for entry in entries] != [_without_padding(entry) for entry in by_shard[0]]:
            problems.append(f"shard {number}: expected the shard_metadata of shard 0, but for paddings, got another")
    raise_if(CheckpointError, source, problems)
    return [_group(same) for same in zip(*by_shard, strict=True)]


class _Entry(NamedTuple):
    path: Any  # of the module, "" for the root
    key: Any
    fields: Any  # names, shapes, numels, padding
    unshared: bool  # of a mixture of experts


def _entries(metadata) -> Iterator[_Entry]:
    modules = metadata.get("param_metadata") if isinstance(metadata, dict) else None
    for module in modules if isinstance(modules, list) else [None]:
        module = module if isinstance(module, dict) else {}
        params = module.get("params")
        for key, fields in params.items() if isinstance(params, dict) else [("", None)]:
            yield _Entry(module.get("fsdp_path"), key, fields, bool(module.get("no_broadcast_optim_state")))


def _entry_problem(entry: _Entry) -> str | None:
    path, key, fields, unshared = entry
    if not isinstance(path, str) or not isinstance(fields, dict):
        return ": expected param_metadata of fsdp_path and params"
    values: list[Any] = [fields.get(field) for field in ("names", "shapes", "numels", "padding")]
    names, shapes, numels, padding = values
    where = f" of {path or 'the root'}, {key[:200]}"
    if not all(isinstance(listed, list) for listed in (names, shapes, numels)) or not (
        len(names) == len(shapes) == len(numels)
    ):
        return f"{where}: expected lists of names, shapes and numels of one length"
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        return f"{where}: expected names that differ"
    for name, shape, numel in zip(names, shapes, numels, strict=True):
        if not _is_shape(shape) or math.prod(shape) != numel:
            return f"{where}: {name[:200]}: expected a shape of {outline(numel)} elements, got {outline(shape)}"
    if type(padding) is not int or padding < 0:
        return f"{where}: expected a padding of at least 0, got {outline(padding)}"
    return f"{where}: an expert, which OPT does not have" if unshared else None


def _is_shape(shape) -> bool:
    is_short = isinstance(shape, list) and 0 < len(shape) <= _MAX_DIMENSIONS
    return is_short and all(type(size) is int and 0 < size < 1 << 40 for size in shape)


def _without_padding(entry: _Entry) -> _Entry:
    return entry._replace(fields={key: entry.fields[key] for key in ("names", "shapes", "numels")})


def _group(same: tuple[_Entry, ...]) -> Group:
    """Of what the shards say about one group."""
    path, key, fields, _ = same[0]
    prefix = f"{path}." if path else ""
    shapes = {f"{prefix}{name}": tuple(s) for name, s in zip(fields["names"], fields["shapes"], strict=True)}
    return Group(f"{prefix}{key}", shapes, tuple(entry.fields["padding"] for entry in same))


# -- what is in a group, by the order of the modules ------------------------------------------------------------------


def groups_of_config(keys: set[str], config: OPTConfig, parts: int, *, joint: bool) -> list[Group]:
    """The groups of a part without metadata: all in the root, or, where `keys` has any of a layer, a group per layer.

    `joint`: keys, values and queries are one tensor, as in the model-parallel classes.
    """
    first, last = _ends(config, parts)
    layers = [_layer(f"decoder.layers.{layer}", config, parts, joint) for layer in range(config.num_hidden_layers)]
    if keys == {ROOT}:
        return [Group(ROOT, dict(itertools.chain(first, *layers, last)), (0,))]
    of_layers = [Group(f"decoder.layers.{layer}.{ROOT}", dict(of), (0,)) for layer, of in enumerate(layers)]
    return [Group(ROOT, dict([*first, *last]), (0,)), *of_layers]


def padded(groups: list[Group], shards: list[Shard]) -> list[Group]:
    """With the paddings that the lengths of the shards imply, where they are padded as fairscale would."""
    return [group._replace(paddings=tuple(_paddings(group, shards))) for group in groups]


def _paddings(group: Group, shards: list[Shard]) -> Iterator[int]:
    lengths = [math.prod(shard.tensors[group.key].shape) if group.key in shard.tensors else 0 for shard in shards]
    excess = sum(lengths) - group.size
    is_padded = 0 <= excess < len(shards)
    for following in range(len(shards))[::-1]:
        yield min(lengths[0], max(0, excess - following * lengths[0])) if is_padded else 0


_Named = list[tuple[str, Shape]]


def _ends(config: OPTConfig, parts: int) -> tuple[_Named, _Named]:
    """The weights before and after the layers."""
    width, narrow = config.hidden_size, config.word_embed_proj_dim
    first: _Named = [("decoder.embed_tokens.weight", (config.vocab_size // parts, narrow))]
    last = _norm("decoder.layer_norm", config) if config.has_final_layer_norm else []
    if config.has_projections:
        first.append(("decoder.project_in_dim.weight", (width, narrow)))
        last.append(("decoder.project_out_dim.weight", (narrow, width)))
    first.append(("decoder.embed_positions.weight", (config.max_position_embeddings + POSITION_OFFSET, width)))
    return first, last


def _layer(prefix: str, config: OPTConfig, parts: int, joint: bool) -> _Named:
    width, inner = config.hidden_size, config.ffn_dim // parts
    of_heads = width // parts
    attention = [("qkv", 3 * of_heads)] if joint else [(letter, of_heads) for letter in "kvq"]
    named: _Named = []
    for name, rows in attention:
        named += _linear(f"{prefix}.self_attn.{name}_proj", rows, width, config)
    named += _linear(f"{prefix}.self_attn.out_proj", width, of_heads, config)
    named += _norm(f"{prefix}.self_attn_layer_norm", config)
    named += _linear(f"{prefix}.fc1", inner, width, config)
    named += _linear(f"{prefix}.fc2", width, inner, config)
    return named + _norm(f"{prefix}.final_layer_norm", config)


def _linear(name: str, rows: int, columns: int, config: OPTConfig) -> _Named:
    weight = (f"{name}.weight", (rows, columns))
    return [weight, (f"{name}.bias", (rows,))] if config.enable_bias else [weight]


def _norm(name: str, config: OPTConfig) -> _Named:
    shape = (config.hidden_size,)
    return [(f"{name}.weight", shape), (f"{name}.bias", shape)] if config.layer_norm_elementwise_affine else []


# -- cutting the weights out ------------------------------------------------------------------------------------------


class ShardedPart(MappedFile):
    """The weights of one part whose flat tensors are cut into shards."""

    def __init__(self, files: list[MappedFile], tensors: dict[str, StoredTensor]):
        super().__init__(files[0].path, tensors)  # whose offsets count through all shards
        self._files = files  # each with its run of a weight under the weight's name

    def view(self, name: str) -> np.ndarray:
        """As `MappedFile.view` where the weight lies in one shard, else a copy."""
        tensor = self.tensors[name]
        files = [file for file in self._files if name in file.tensors]
        if len(files) == 1:
            return files[0].view(name).reshape(tensor.shape)
        flat, start = np.empty(math.prod(tensor.shape), DTYPES[tensor.dtype]), 0
        for file in files:  # read, not mapped: a map of each of a thousand shards would take as many descriptors
            run = file.tensors[name]
            with open(file.path, "rb") as stream:
                stream.seek(run.offset)
                read = stream.readinto(flat[start : start + run.shape[0]].view(np.uint8).data)
            if read != run.nbytes:
                raise CheckpointError(str(file.path), [f"{name}: truncated, expected {run.nbytes} bytes, got {read}"])
            start += run.shape[0]
        return flat.reshape(tensor.shape)

    def close(self) -> None:
        for file in self._files:
            file.close()


def cut(shards: list[Shard], groups: list[Group], source: str) -> MappedFile:
    """The weights of one part, from its shards.

    Raises:
        CheckpointError: lists flat tensors that are missing, left over, of other sizes than the groups, or interrupted.
    """
    problems = [problem for number, shard in enumerate(shards) for problem in _key_problems(number, shard, groups)]
    raise_if(CheckpointError, source, problems)
    problems = [f"{group.key}: {problem}" for group in groups if (problem := _group_problem(group, shards))]
    counts = Counter(name for group in groups for name in group.shapes)
    problems += [f"{name[:200]}: in two flat tensors" for name, count in counts.items() if count > 1][:20]
    raise_if(CheckpointError, source, problems)
    runs: list[dict[str, StoredTensor]] = [{} for _ in shards]
    tensors: dict[str, StoredTensor] = {}
    start = 0  # bytes of the groups before
    for group in groups:
        start = _cut_group(group, [shard.tensors[group.key] for shard in shards], start, runs, tensors)
    if len(shards) == 1:
        whole = {name: tensor._replace(offset=runs[0][name].offset) for name, tensor in tensors.items()}
        return MappedFile(shards[0].path, whole)
    return ShardedPart([MappedFile(shard.path, of) for shard, of in zip(shards, runs, strict=True)], tensors)


def _key_problems(number: int, shard: Shard, groups: list[Group]) -> Iterator[str]:
    expected = {group.key for group in groups}
    yield from (f"shard {number}: {key[:200]}: missing" for key in sorted(expected - shard.tensors.keys())[:20])
    extra = sorted(shard.tensors.keys() - expected)[:20]
    yield from (f"shard {number}: {key[:200]}: neither a flat tensor that is known nor a weight" for key in extra)


def _group_problem(group: Group, shards: list[Shard]) -> str | None:
    flats = [shard.tensors[group.key] for shard in shards]
    if flats[0].dtype not in DTYPES:
        return f"expected a dtype of {', '.join(DTYPES)}, got {flats[0].dtype}"
    if any(flat[:2] != flats[0][:2] or flat.strides is not None or len(flat.shape) != 1 for flat in flats):
        return f"expected one dimension and one size and dtype in all shards, got {sorted({f[:2] for f in flats})[:4]}"
    (length,) = flats[0].shape
    if max(group.paddings) > length:
        return f"expected a padding of at most {length}, got {max(group.paddings)}"
    held = [length - padding for padding in group.paddings]
    if sum(held) != group.size:
        return f"expected {group.size} elements ({', '.join(list(group.shapes)[:3])}, ...), got {sum(held)}"
    is_interrupted = any(count < length and following for count, following in itertools.pairwise(held))
    return "padding before the end: the shards are not in order" if is_interrupted else None


def _cut_group(
    group: Group, flats: list[StoredTensor], start: int, runs: list[dict[str, StoredTensor]], tensors: dict
) -> int:
    """Adds the group's weights to `tensors` and their runs to those of each shard; where the next group starts."""
    dtype, (length,) = flats[0].dtype, flats[0].shape
    item_bytes, begin = DTYPES[dtype].itemsize, 0
    for name, shape in group.shapes.items():
        end = begin + math.prod(shape)
        tensors[name] = StoredTensor(dtype, shape, start + begin * item_bytes)
        for number in range(begin // length, (end - 1) // length + 1):
            low, high = max(begin, number * length), min(end, (number + 1) * length)
            offset = flats[number].offset + (low - number * length) * item_bytes
            runs[number][name] = StoredTensor(dtype, (high - low,), offset)
        begin = end
    return start + begin * item_bytes
