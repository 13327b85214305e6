"""Which files make up a metaseq checkpoint, by their names: model-parallel parts, each in one file or in shards.

The names that metaseq and its scripts gave to what they saved (README of metaseq, `projects/OPT/download_opt175b.md`,
`metaseq/scripts/`):

    reshard.pt, restored.pt, x_consolidated.pt        one file
    x-model_part-0.pt, x_part0.pt                     model-parallel parts ("x" may itself contain ".pt")
    x-model_part-0-shard0.pt, x-shard0.pt             shards of each part, or of the only one
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from opt_core.errors import CheckpointError, raise_if

_PART_AND_SHARD = re.compile(
    r"(?P<stem>.*?)(-model_part-(?P<part>\d{1,4})|_part(?P<short>\d{1,4}))?(-shard(?P<shard>\d{1,4}))?", re.DOTALL
)
_SINGLE = re.compile(r"reshard|restored|.*_consolidated")


class _Name(NamedTuple):
    """What a file name says: files of one set agree in `stem` and `numbered`."""

    stem: str
    numbered: tuple[str, ...]  # how its part and its shard are written
    part: int
    shard: int


def files_of(path: Path) -> list[list[Path]]:
    """The files of a folder, or of the set that one file belongs to: a list of parts, each a list of shards, in order.

    Raises:
        CheckpointError: names the numbers that are missing or there twice, or the sets of a folder that has several.
    """
    if not path.is_dir() and not path.is_file():  # a pipe, at which reading would wait
        raise CheckpointError(str(path), ["expected a file or a folder"])
    folder = path if path.is_dir() else path.parent
    names = {file: _name(file.name) for file in sorted(folder.glob("*.pt")) if file.is_file()}
    if path.is_dir():
        return _set_of_folder(folder, names)
    name = _name(path.name)
    if not name.numbered:
        return [[path]]
    return _in_order({file: other for file, other in names.items() if other[:2] == name[:2]}, path)


def is_of_metaseq(name: str) -> bool:
    """True for a file name that one of metaseq's programs would give."""
    parsed = _name(name)
    return name.endswith(".pt") and bool(parsed.numbered or _SINGLE.fullmatch(parsed.stem))


def _set_of_folder(folder: Path, names: dict[Path, _Name]) -> list[list[Path]]:
    known = {file: name for file, name in names.items() if is_of_metaseq(file.name)} or names
    sets = dict.fromkeys(name[:2] for name in known.values())
    if len(sets) != 1:
        found = ", ".join(next(file.name for file in known if known[file][:2] == one) for one in list(sets)[:5])
        text = f"expected the parts of one checkpoint, got {len(sets)} ({found}): give one of their files"
        raise CheckpointError(str(folder), [text if sets else "no *.pt file"])
    return _in_order(known, folder)


def _name(name: str) -> _Name:
    match = _PART_AND_SHARD.fullmatch(name.removesuffix(".pt"))
    assert match, name
    part, shard = match["part"] or match["short"], match["shard"]
    way = "-model_part-" if match["part"] else "_part"
    numbered = ((way,) if part else ()) + (("-shard",) if shard else ())
    return _Name(match["stem"], numbered, int(part or 0), int(shard or 0))


def _in_order(names: dict[Path, _Name], source: Path) -> list[list[Path]]:
    files = {(name.part, name.shard): file for file, name in names.items()}
    parts, shards = (1 + max(numbers) for numbers in zip(*files, strict=True))
    problems = list(_repeated(names))
    if parts * shards > 100 * len(files):
        problems.append(f"expected {parts} parts of {shards} shards, by the highest numbers, got {len(files)} files")
    else:
        expected = ((part, shard) for part in range(parts) for shard in range(shards))
        problems += [f"{_text(key, names)}: missing" for key in expected if key not in files]
    raise_if(CheckpointError, str(source), problems)
    return [[files[part, shard] for shard in range(shards)] for part in range(parts)]


def _repeated(names: dict[Path, _Name]) -> Iterable[str]:
    for key, count in Counter((name.part, name.shard) for name in names.values()).items():
        if count > 1:
            found = ", ".join(file.name for file, name in names.items() if (name.part, name.shard) == key)
            yield f"{_text(key, names)}: expected one file, got {found}"


def _text(key: tuple[int, int], names: dict[Path, _Name]) -> str:
    name = next(iter(names.values()))
    numbers = dict(zip(name.numbered, key if len(name.numbered) == 2 else (max(key),), strict=True))
    return name.stem + "".join(f"{way}{number}" for way, number in numbers.items()) + ".pt"
