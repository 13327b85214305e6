"""The manifest: a hash for each weight, the same in every format, so that checkpoints compare without being read.

`opt_manifest.json` lies beside the weights that this project writes. What a hash covers is what the checkpoint reads
back: the weight's values in the shape and order of the schema, row-major, little-endian, in the dtype that is stored.
So hashes of two checkpoints are equal where the weights are equal bit for bit, whatever the formats. It is a statement
about the files as they were written; `differing_weights` reads a checkpoint again and says whether it still holds.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from conversion.background import Background
from conversion.blocks import (
    cast,
    count_not_finite,
    is_zero,
    joined_blocks,
    largest_overflow,
    row_major_blocks,
    without_first_rows,
)
from conversion.checkpoint import Checkpoint
from conversion.stored import DTYPES
from opt_core.errors import CheckpointError, ConfigError, raise_if
from opt_core.json_file import read_json_object

MANIFEST_NAME = "opt_manifest.json"
_VERSION = 1
_EXPLANATION = "BLAKE3 of the row-major little-endian bytes in the published shape, in this dtype"
_HEX_DIGITS = 64


class Record(NamedTuple):
    """What the manifest says of one weight."""

    shape: tuple[int, ...]
    dtype: str
    blake3: str


class Manifest(NamedTuple):
    format: str  # a key of `conversion.formats.FORMATS`
    task: str
    weights: dict[str, Record]  # by the schema's names


def write_manifest(folder: Path, manifest: Manifest) -> None:
    weights = {name: record._asdict() for name, record in manifest.weights.items()}
    fields = {"version": _VERSION, "hashes": _EXPLANATION, **manifest._asdict(), "weights": weights}
    (folder / MANIFEST_NAME).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def read_manifest(source: Path) -> Manifest:
    """The manifest in a folder, or beside a weight file.

    Raises:
        CheckpointError: there is none, or it is not as `write_manifest` writes it.
    """
    path = (source if source.is_dir() else source.parent) / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(str(source), [f"{MANIFEST_NAME}: missing; `opt-zoo convert` writes it"])
    try:
        fields = read_json_object(path)
    except ConfigError as error:
        raise CheckpointError(error.title, error.problems) from None
    raise_if(CheckpointError, str(path), _problems(fields))
    weights = {name: Record(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in fields["weights"].items()}
    return Manifest(fields["format"], fields["task"], weights)


def _problems(fields: Mapping[str, Any]) -> Iterator[str]:
    if fields.get("version") != _VERSION:
        yield f"version: expected {_VERSION}, got {str(fields.get('version'))[:100]}"
    for field in ("format", "task"):
        if not isinstance(fields.get(field), str):
            yield f"{field}: expected a text, got {str(fields.get(field))[:100]}"
    weights = fields.get("weights")
    if not isinstance(weights, dict) or not weights:
        yield "weights: expected an object of names and hashes"
        return
    for name, entry in weights.items():
        if not _is_record(entry):
            yield f"{name[:200]}: expected shape, dtype and {_HEX_DIGITS} digits of blake3, got {str(entry)[:100]}"


def _is_record(entry) -> bool:
    if not isinstance(entry, dict) or entry.keys() != set(Record._fields):
        return False
    shape, digits = entry["shape"], entry["blake3"]
    is_shape = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    return is_shape and entry["dtype"] in [*DTYPES] and isinstance(digits, str) and len(digits) == _HEX_DIGITS


# -- values -----------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What is known of a weight once all its values have passed."""

    blake3: str
    not_finite: int  # NaN and infinities in the source
    overflow: float  # the largest finite magnitude that became infinite, or 0
    is_zero: bool


def look_at(array: np.ndarray, dtype: np.dtype, skipped_rows: int) -> Seen:
    """All that is to be known of a weight, of any strides, which is written as `dtype` without its first rows."""
    digest, not_finite, overflow, only_zeros = blake3(), 0, 0.0, True
    for block in row_major_blocks(without_first_rows(array, skipped_rows)):
        rounded = cast(block, dtype)
        not_finite += count_not_finite(block)
        overflow = max(overflow, largest_overflow(block, rounded))
        only_zeros = only_zeros and is_zero(rounded)
        digest.update(as_bytes(rounded))
    return Seen(digest.hexdigest(), not_finite, overflow, only_zeros)


def blake3_of(blocks: Iterable[np.ndarray]) -> str:
    digest = blake3()
    for block in blocks:
        digest.update(as_bytes(block))
    return digest.hexdigest()


def as_bytes(block: np.ndarray) -> memoryview:
    return block.view(np.uint8).data


def differing_weights(checkpoint: Checkpoint, manifest: Manifest) -> list[str]:
    """The names of all weights that are not, or not as, in the manifest; reads every weight once."""
    differing = [name for name in manifest.weights if name not in checkpoint.shapes]
    hashes = {}
    with Background() as background:
        for name, shape in checkpoint.shapes.items():
            record = manifest.weights.get(name)
            if record is None or record[:2] != (shape, checkpoint.dtypes[name]):
                differing.append(name)
                continue
            background.make_room()
            pieces, axis = checkpoint.pieces(name)
            hashes[name] = background.submit(pieces, _blake3_of_pieces, pieces, axis)
        differing += [name for name, it in hashes.items() if it.result() != manifest.weights[name].blake3]
    return differing


def _blake3_of_pieces(pieces: list[np.ndarray], axis: int) -> str:
    return blake3_of(joined_blocks(pieces, axis))
