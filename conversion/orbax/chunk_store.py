"""Keys and values in a folder, as TensorStore keeps them: one file for each key, or an OCDBT database of a few files.

Finds where the bytes of every value lie, without reading values; no path leaves the folder, and no value reaches past
its file. What the keys mean is not its business.
"""

import itertools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversion.orbax import ocdbt
from conversion.orbax.ocdbt import Value
from opt_core.errors import CheckpointError, raise_if

_MAX_FILES = 1 << 17
_MAX_DEPTH = 16


class ChunkStore:
    """The keys of a folder, and where the value of each lies."""

    def __init__(self, folder: Path, values: dict[str, Value], is_ocdbt: bool):
        self.folder, self.values = folder, values
        self.is_ocdbt = is_ocdbt

    def read(self, key: str) -> memoryview:
        """The bytes of a value: a view on a map of its file."""
        value = self.values[key]
        if value.inline is not None or not value.length:
            return memoryview(value.inline or b"")
        with open(self.folder / value.file, "rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(whole)[value.offset : value.offset + value.length]

    def spec(self, prefix: str) -> dict[str, Any]:
        """What TensorStore needs to open the keys that start with `prefix`."""
        if self.is_ocdbt:
            return ocdbt_spec(self.folder, prefix)
        return _file_spec(self.folder, prefix)


def _file_spec(folder: Path, prefix: str = "") -> dict[str, Any]:
    return {"driver": "file", "path": f"{folder.absolute()}/{prefix}"}


def ocdbt_spec(folder: Path, prefix: str = "") -> dict[str, Any]:
    """What TensorStore needs to open a database in a folder."""
    return {"driver": "ocdbt", "base": _file_spec(folder), "path": prefix}


def open_store(folder: Path) -> ChunkStore:
    """Lists the keys of a folder: those of its OCDBT database where it holds one, else its files.

    Raises:
        CheckpointError: names the file or the key, what was expected there and what is there.
    """
    files = _files_below(folder)
    if ocdbt.MANIFEST not in files:
        values = {name: Value(name, 0, size) for name, size in files.items()}
        return ChunkStore(folder, values, is_ocdbt=False)
    try:
        values = ocdbt.read_values(folder, files)
    except ValueError as error:
        text = f"expected an OCDBT database as Orbax writes it, got a damaged one: {str(error)[:300]}"
        raise CheckpointError(str(folder), [text]) from None
    return ChunkStore(folder, values, is_ocdbt=True)


def _files_below(folder: Path) -> dict[str, int]:
    """Every file by its path from the folder, with its size; links may not leave the folder."""
    found: dict[str, int] = {}
    problems: list[str] = []
    for name, entry in itertools.islice(_entries_below(folder), _MAX_FILES + 1):
        if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(folder.resolve()):
            problems.append(f"{name}: a link that leaves the folder")
        elif not entry.is_file():
            problems.append(f"{name}: expected a file or a folder, got a link, a pipe or a device")
        else:
            found[name] = entry.stat().st_size
    if len(found) > _MAX_FILES:
        problems = [f"expected at most {_MAX_FILES} files"]
    raise_if(CheckpointError, str(folder), problems)
    return found


def _entries_below(folder: Path) -> Iterator[tuple[str, os.DirEntry]]:
    """All that is no real folder, at any depth up to a bound."""
    waiting = [(str(folder), "", 0)]
    while waiting:
        parent, prefix, depth = waiting.pop()
        with os.scandir(parent) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) and depth < _MAX_DEPTH:
                    waiting.append((entry.path, f"{prefix}{entry.name}/", depth + 1))
                else:
                    yield f"{prefix}{entry.name}", entry
