"""How Orbax describes a checkpoint: where in a folder it lies, whether it is finished, which leaves its tree has.

Reads and writes the JSON beside the arrays, strictly; the arrays are not its business. Which leaves are weights, and
what they are called, is decided here by their keys. Source: `_src/metadata/tree.py` and `_src/path/step.py` of Orbax
0.12.8.
"""

import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from conversion.safetensors_file import PlannedTensor
from opt_core.errors import CheckpointError, ConfigError, raise_if
from opt_core.json_file import read_json_object

METADATA = "_METADATA"
CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"
_ITEM = "default"  # of a step of CheckpointManager
_STEP = re.compile(r"(?:.*_)?([0-9]{1,18})")
_MAX_ENTRIES = 1 << 17
_NUMPY = "np.ndarray"
_ARRAYS = ("jax.Array", _NUMPY)
_PARAMS, _VALUE = "params", "value"
_BESIDE_WEIGHTS = {"opt_state", "step", "rng", "rngs"}
_DICT_KEY = 2  # Orbax's number for it
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


class Leaf(NamedTuple):
    """A leaf of the tree as the description has it."""

    keys: tuple[str, ...]
    kind: str  # Orbax's word for its type
    saved_shape: tuple[int, ...] | None  # of what one process saved; the array is a multiple of it

    @property
    def stored(self) -> str:
        return ".".join(self.keys)


class Description(NamedTuple):
    """The tree of a checkpoint, and the form of its arrays."""

    leaves: list[Leaf]
    is_ocdbt: bool | None  # None: older versions do not say it
    zarr_version: int

    @property
    def has_params(self) -> bool:
        """True where weights are told from the rest by their first key."""
        return any(leaf.keys[0] == _PARAMS for leaf in self.leaves)


def find_checkpoint(path: Path) -> Path:
    """The folder with `_METADATA` that `path` is or holds; see `orbax_folder.open_folder`.

    Raises:
        CheckpointError: there is none, it is unfinished, or there are several.
    """
    if not path.is_dir():
        raise CheckpointError(str(path), ["expected a folder, as Orbax writes it"])
    _check_finished(path)
    if _holds_tree(path):
        return path
    items = [name for name in _folders_in(path) if _holds_tree(path / name)]
    return _only_item(path, items) if items else _in_latest_step(path)


def _holds_tree(folder: Path) -> bool:
    return (folder / METADATA).is_file()


def _folders_in(folder: Path) -> list[str]:
    """The names of real folders in a folder, temporary ones left out."""
    with os.scandir(folder) as entries:
        some = itertools.islice(entries, _MAX_ENTRIES)
        return sorted(e.name for e in some if e.is_dir(follow_symlinks=False) and _UNFINISHED not in e.name)


def _only_item(step: Path, items: list[str]) -> Path:
    if _ITEM not in items and len(items) > 1:
        raise CheckpointError(str(step), [f"expected one item, or one called {_ITEM}, got {', '.join(items[:10])}"])
    item = step / (_ITEM if _ITEM in items else items[0])
    _check_finished(item)
    return item


def _in_latest_step(folder: Path) -> Path:
    numbered = {name: int(match[1]) for name in _folders_in(folder) if (match := _STEP.fullmatch(name))}
    latest = [name for name, number in numbered.items() if number == max(numbered.values())]
    if len(latest) != 1:
        expected = f"{METADATA} of a checkpoint of Orbax, or one latest step"
        raise CheckpointError(str(folder), [f"expected {expected}, got {', '.join(latest[:10]) or 'neither'}"])
    step = folder / latest[0]
    _check_finished(step)
    items = [name for name in _folders_in(step) if _holds_tree(step / name)]
    if not items and not _holds_tree(step):
        raise CheckpointError(str(step), [f"expected {METADATA}, or an item with it: this step has none"])
    return _only_item(step, items) if items else step


def _check_finished(folder: Path) -> None:
    if _UNFINISHED in folder.name:
        raise CheckpointError(str(folder), ["expected a finished checkpoint, got one that Orbax calls temporary"])
    if (folder / CHECKPOINT_METADATA).is_file():
        fields = _read_json(folder / CHECKPOINT_METADATA)
        if fields.get("init_timestamp_nsecs") is not None and fields.get("commit_timestamp_nsecs") is None:
            text = f"{CHECKPOINT_METADATA}: expected the time at which saving ended, got none: it is unfinished"
            raise CheckpointError(str(folder), [text])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except ConfigError as error:
        raise CheckpointError(str(path), error.problems) from None


# -- leaves -----------------------------------------------------------------------------------------------------------


def read_description(folder: Path) -> Description:
    """The leaves of the checkpoint in a folder, and the form of its arrays.

    Raises:
        CheckpointError: lists every entry that is not as Orbax writes it.
    """
    fields = _read_json(folder / METADATA)
    tree = fields.get("tree_metadata")
    if not isinstance(tree, dict) or not tree:
        raise CheckpointError(str(folder), [f"{METADATA}: expected tree_metadata with the leaves of a tree"])
    leaves, problems = [], []
    for text, entry in tree.items():
        try:
            leaves.append(_read_leaf(text, entry))
        except ValueError as error:
            problems.append(f"{METADATA}: {text[:200]}: {error}")
    counts = Counter(leaf.stored for leaf in leaves)
    problems += [f"{METADATA}: {name[:200]}: {n} leaves of this name" for name, n in counts.items() if n > 1]
    is_ocdbt, is_zarr3 = fields.get("use_ocdbt"), fields.get("use_zarr3")
    for name, value in (("use_ocdbt", is_ocdbt), ("use_zarr3", is_zarr3)):
        if not isinstance(value, bool | None):
            problems.append(f"{METADATA}: {name}: expected a truth value, got {str(value)[:100]}")
    raise_if(CheckpointError, str(folder), problems)
    return Description(leaves, is_ocdbt, 3 if is_zarr3 else 2)


def _read_leaf(text: str, entry) -> Leaf:
    try:
        keys = tuple(item["key"] for item in entry["key_metadata"])
        kind, shape = entry["value_metadata"]["value_type"], entry["value_metadata"].get("write_shape")
    except (TypeError, KeyError, AttributeError):
        raise ValueError("expected key_metadata and value_metadata as Orbax writes them") from None
    if not keys or not all(_is_plain(key) for key in keys) or str(keys) != text:
        raise ValueError(f"expected keys without separators, the same twice, got {str(keys)[:200]}")
    if not isinstance(kind, str) or not (shape is None or _is_shape(shape)):
        raise ValueError(f"expected a type and a shape, got {str(kind)[:100]} and {str(shape)[:100]}")
    return Leaf(keys, kind, None if shape is None else tuple(shape))


def _is_plain(key) -> bool:
    return isinstance(key, str) and key not in ("", ".", "..") and not re.search(r"[/\\\x00-\x1f]", key)


def _is_shape(shape) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)


def reason_to_skip(leaf: Leaf, has_params: bool) -> str | None:
    """Why a leaf is no weight; None where it may be one."""
    if leaf.kind not in _ARRAYS:
        return f"a {leaf.kind}, no array"
    if has_params:
        return None if leaf.keys[0] == _PARAMS else f"beside {_PARAMS}"
    return f"below {leaf.keys[0]}" if leaf.keys[0] in _BESIDE_WEIGHTS else None


def name_of(leaf: Leaf) -> str:
    """The stored name of a weight: without `params` before it, and without the `value` of a state of NNX."""
    keys = leaf.keys
    while len(keys) > 1 and keys[0] == _PARAMS:
        keys = keys[1:]
    return ".".join(keys[:-1] if len(keys) > 1 and keys[-1] == _VALUE else keys)


# -- writing ----------------------------------------------------------------------------------------------------------


def write_description(folder: Path, tensors: list[PlannedTensor], started: int) -> None:
    """Writes what makes a folder of arrays a checkpoint; `started` is the time of the first, in ns since 1970."""
    _write_json(folder / METADATA, _tree_of(tensors))
    times = {"init_timestamp_nsecs": started, "commit_timestamp_nsecs": time.time_ns()}
    _write_json(folder / CHECKPOINT_METADATA, {"item_handlers": _HANDLER, **times})


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields), encoding="utf-8")


def name_problems(tensors: list[PlannedTensor]) -> Iterator[str]:
    """What keeps names from making a tree of dicts, cut at their dots."""
    names = {tensor.name for tensor in tensors}
    for name in names:
        keys = name.split(".")
        parents = {".".join(keys[:depth]) for depth in range(1, len(keys))}
        if parents & names:
            yield f"{name}: {min(parents & names)} is an array too"
        if not all(_is_plain(key) for key in keys):
            yield f"{name}: expected keys without separators, joined by dots"


def _tree_of(tensors: list[PlannedTensor]) -> dict[str, Any]:
    tree = {}
    for tensor in sorted(tensors):
        keys = tensor.name.split(".")
        value = {"value_type": _NUMPY, "skip_deserialize": False, "write_shape": tensor.shape}
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            "value_metadata": value,
        }
    forms = {"use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    return {"tree_metadata": tree, **forms, "custom_metadata": None}
