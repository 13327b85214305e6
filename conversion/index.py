"""Shards: which tensor goes into which file, the index that says so, and the rules that a foreign index must keep.

Source: the index that transformers 4.57.6 writes, `{"metadata": {"total_size": ...}, "weight_map": {name: file}}`.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from conversion.stored import DTYPES, TensorFile
from opt_core.errors import CheckpointError, ConfigError, InputError, raise_if
from opt_core.json_file import read_json_object

logger = logging.getLogger(__name__)

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LONGEST_NAME = 255  # of file systems; the shards of OPT have at most 40 letters
_MOST_SHARDS = 10_000
_NUMBERED = re.compile(r"-(\d{5,})-of-(\d{5,})\.")


def read_index(path: Path, suffix: str, *, first_may_be_empty: bool = False) -> dict[str, str]:
    """The checked `weight_map` of an index: stored name to file name, every file a plain name that is there.

    Args:
        path: the index.
        suffix: what the names of the shards must end in.
        first_may_be_empty: the index may leave out the first shard, which the published TensorFlow and Flax code leaves
            empty when the first tensor is larger than a shard.

    Raises:
        CheckpointError: lists every unsafe, missing or incomplete entry.
    """
    weight_map = _weight_map(path)
    shards = _unique(weight_map.values())
    if len(shards) > _MOST_SHARDS:
        raise CheckpointError(str(path), [f"weight_map: expected at most {_MOST_SHARDS} files, got {len(shards)}"])
    problems = [
        problem for shard in shards for problem in (_name_problems(shard, suffix) or file_problems(path, shard))
    ]
    raise_if(CheckpointError, str(path), problems or _numbering_problems(set(shards), first_may_be_empty))
    return weight_map


def index_files(path: Path, suffix: str) -> list[str]:
    """The names of the shards in an index, checked to be safe, before the files are there (on the way from the hub)."""
    shards = _unique(_weight_map(path).values())
    raise_if(CheckpointError, str(path), [problem for shard in shards for problem in _name_problems(shard, suffix)])
    return shards


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json_object(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(error.title, error.problems) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(str(path), ["weight_map: expected an object of tensor and file names"])
    return weight_map


def check_against_shards(weight_map: Mapping[str, str], stored: Mapping[str, Iterable[str]], source: str) -> None:
    """Raises unless each shard holds exactly the tensors that the index puts there.

    Args:
        weight_map: stored name to file name.
        stored: file name to the names found in it.
    """
    places: dict[str, list[str]] = {}
    for shard, names in stored.items():
        for name in names:
            places.setdefault(name, []).append(shard)
    problems = [f"{name}: stored in {' and '.join(files)}" for name, files in places.items() if len(files) > 1]
    problems += [
        f"{name}: stored in {files[0]}, not in the index" for name, files in places.items() if name not in weight_map
    ]
    for name, shard in weight_map.items():
        if shard not in places.get(name, ()):
            elsewhere = f", but in {places[name][0]}" if name in places else ""
            problems.append(f"{name}: the index says {shard}, where it is not{elsewhere}")
    raise_if(CheckpointError, source, problems)


def warn_of_size(path: Path, files: Iterable[TensorFile]) -> None:
    """Says so where the index gives another number of bytes than its tensors have; weights are not read by it."""
    tensors = [(file.path, tensor) for file in files for tensor in file.tensors.values() if tensor.dtype in DTYPES]
    metadata = read_json_object(path).get("metadata")
    listed = metadata.get("total_size") if isinstance(metadata, dict) else None
    found = {sum(tensor.nbytes for _, tensor in some) for some in (tensors, set(tensors))}  # tied ones may count once
    if isinstance(listed, (int, float)) and listed not in found:
        logger.warning("%s: metadata.total_size: expected %d bytes, got %s", path, max(found), str(listed)[:40])


def _unique(values: Iterable) -> list:
    return list({str(value): value for value in values}.values())


def _name_problems(shard, suffix: str) -> list[str]:
    if not isinstance(shard, str) or not _is_plain(shard):
        return [f"{str(shard)[:200]!r}: expected the plain name of a file beside the index"]
    return [] if shard.endswith(suffix) else [f"{shard}: expected a name that ends in {suffix}"]


def file_problems(index: Path, shard: str) -> list[str]:
    """What is wrong with a file that should lie beside an index: it is missing, or a link out of the folder."""
    path = index.parent / shard
    if not path.is_file():
        return [f"{shard}: missing, expected beside the index"]
    return [] if path.resolve().is_relative_to(_boundary(index.parent)) else [f"{shard}: a link that leaves the folder"]


def _is_plain(name: str) -> bool:
    is_short = len(name) <= _LONGEST_NAME and name.isprintable()  # half a surrogate pair is not printable
    return is_short and name not in ("", ".", "..") and not re.search(r"[/\\:]", name)


def _boundary(folder: Path) -> Path:
    """The folder itself, or that of the repository where `folder` is a snapshot in huggingface_hub's cache.

    There, snapshots hold links to `../../blobs/<hash>`.
    """
    for parent in [folder.absolute(), *folder.absolute().parents]:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent.resolve()
    return folder.resolve()


def _numbering_problems(shards: set[str], first_may_be_empty: bool) -> Iterator[str]:
    numbers = [match.groups() for shard in shards if (match := _NUMBERED.search(shard))]
    if not numbers:
        return
    totals = {int(total) for _, total in numbers}
    if len(totals) > 1 or len(numbers) != len(shards):
        yield f"shards of different sets: {', '.join(sorted(shards)[:10])}"
        return
    found, total = {int(number) for number, _ in numbers}, max(totals)
    if first_may_be_empty and total == len(numbers) + 1:
        found.add(1)
    if found != set(range(1, min(total, len(numbers) + 1) + 1)):
        yield f"expected {max(totals)} shards, the index names {len(numbers)}"


# -- writing ----------------------------------------------------------------------------------------------------------


def parse_size(size: int | str) -> int:
    """Bytes of "5GB" (decimal), "200MiB" (binary) or a number."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)", str(size).upper().strip())
    if isinstance(size, float) or (match and "." in match[1] and not match[2]):
        match = None  # no part of a byte
    bytes_ = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if bytes_ <= 0:
        raise InputError("max_shard_size", [f"expected a size such as '5GB' or a number of bytes, got {size!r}"])
    return bytes_


def plan_shards(sizes: Mapping[Any, int], largest: int) -> list[list]:
    """The keys in order, cut where a shard would exceed `largest` bytes; a larger tensor has a shard alone."""
    shards: list[list] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > largest:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def shard_name(stem: str, suffix: str, number: int, total: int) -> str:
    """The file name of shard `number` from 1: that of the single file when there is one only."""
    return f"{stem}{suffix}" if total == 1 else f"{stem}-{number:05d}-of-{total:05d}{suffix}"
