"""The checkpoint that TensorFlow 2 writes, read and written without TensorFlow: an index and raw bytes beside it.

`<prefix>.index` is an `sstable` of what `<prefix>.data-00000-of-00001` (or several such) holds: dtype, shape, place
and checksum by key. It is what tf.train.Checkpoint writes, and what lies in the `variables` folder of a SavedModel,
whose program is never looked at. Names are attribute paths (`trackable_graph`); formats and models are not its
business. Source: `tensorflow/core/util/tensor_bundle/{naming,tensor_bundle}.cc` of TensorFlow 2.21.
"""

import itertools
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import IO, cast

import numpy as np

from conversion import crc32c
from conversion.index import file_problems
from conversion.safetensors_file import ALIGNMENT, PlannedTensor
from conversion.stored import MappedFile, StoredTensor
from conversion.tf_checkpoint.bundle_entry import (
    Entry,
    entry_bytes,
    place_problems,
    read_entry,
    read_text,
    text_bytes,
    weight_problems,
)
from conversion.tf_checkpoint.protobuf_wire import Malformed, bytes_of, message, number_of, values
from conversion.tf_checkpoint.sstable import read_table, table_bytes
from conversion.tf_checkpoint.trackable_graph import (
    COUNTER_NAME,
    GRAPH_KEY,
    graph_bytes,
    key_of,
    name_of,
    variable_names,
)
from opt_core.errors import CheckpointError, raise_if

_SUFFIX = ".index"
_STATE_NAME = "checkpoint"
_MAX_STATE_BYTES = 1 << 20
_MAX_SHARDS = 9999
_MAX_GRAPH_BYTES = 1 << 22  # that of a Keras model takes 12 KB a layer
_CHUNK_BYTES = 1 << 22
_VERSION = 1


class BundleFile:
    """An opened checkpoint: a `TensorFile` over one or more files of bytes.

    Attributes:
        path: the index.
        tensors: by attribute path, e.g. `model/decoder/layers/0/fc1/weight`; offsets count through all data files.
        skipped: the keys that are no weights of a model: counters, what optimizers and metrics keep, the object graph.
    """

    def __init__(self, path: Path, shards: list[Path], entries: dict[str, Entry], names: dict[str, str]):
        self.path = path
        self.skipped = tuple(key for key in entries if key not in names)
        starts = [0, *itertools.accumulate(shard.stat().st_size for shard in shards)]
        self.tensors: dict[str, StoredTensor] = {}
        self._parts = [MappedFile(shard, {}) for shard in shards]
        self._part_of: dict[str, MappedFile] = {}
        for key, name in names.items():
            entry = entries[key]
            self._part_of[name] = self._parts[entry.shard]
            self._part_of[name].tensors[name] = StoredTensor(entry.dtype, entry.shape, entry.offset)
            self.tensors[name] = StoredTensor(entry.dtype, entry.shape, starts[entry.shard] + entry.offset)

    def read(self, name: str) -> np.ndarray:
        """As `MappedFile.read`; of what lies at an odd address, as TensorFlow packs it, a copy."""
        return self._part_of[name].read(name)

    def view(self, name: str) -> np.ndarray:
        return self._part_of[name].view(name)

    def close(self) -> None:
        for part in self._parts:
            part.close()


def latest_index(folder: Path) -> Path | None:
    """Of several checkpoints in a folder the index of the one that TensorFlow's file `checkpoint` names, if it does."""
    state = folder / _STATE_NAME
    if not state.is_file() or state.stat().st_size > _MAX_STATE_BYTES:
        return None
    named = re.search(r'^model_checkpoint_path: "([^"]+)"', state.read_text(errors="replace"), re.M)
    index = folder / f"{PurePath(named[1]).name}{_SUFFIX}" if named else None  # also in a folder that was moved
    return index if index is not None and index.is_file() else None


def open_file(path: Path, *, verify: bool = False) -> BundleFile:
    """Reads an index and the object graph, not the weights unless `verify`, which compares their checksums.

    Raises:
        CheckpointError: lists every entry that disagrees with the data files.
    """
    if verify:
        crc32c.check_is_fast()
    table = read_table(path)
    shards = _shards(path, table.pop(b"", None))
    entries = _read_entries(path, table, [shard.stat().st_size for shard in shards])
    raise_if(CheckpointError, str(path), _overlaps(entries))
    names = _names(path, entries, shards)
    if verify:
        raise_if(CheckpointError, str(path), _checksum_problems(entries, shards))
    return BundleFile(path, shards, entries, names)


def _shards(path: Path, header: bytes | None) -> list[Path]:
    """The data files, from the index's first entry."""
    if header is None:
        raise CheckpointError(str(path), ["expected the index of a checkpoint, got a table without its header"])
    try:
        content = values(header)
        count, is_big_endian = number_of(content, 1), number_of(content, 2)
        oldest_reader = number_of(values(bytes_of(content.get(3, b""))), 2)
    except Malformed as error:
        raise CheckpointError(str(path), [f"header: {error}"]) from None
    if not 0 < count <= _MAX_SHARDS or is_big_endian or oldest_reader > _VERSION:
        text = f"header: expected 1 to {_MAX_SHARDS} data files, little-endian, for readers of version {_VERSION}"
        got = f"{count}, {'big' if is_big_endian else 'little'}-endian, version {oldest_reader}"
        raise CheckpointError(str(path), [f"{text}, got {got}"])
    shards = [path.with_name(_data_name(path.name.removesuffix(_SUFFIX), number, count)) for number in range(count)]
    problems = [problem for shard in shards for problem in file_problems(path, shard.name)]
    raise_if(CheckpointError, str(path), problems[:10])
    return shards


def _data_name(prefix: str, number: int, count: int) -> str:
    return f"{prefix}.data-{number:05d}-of-{count:05d}"


# -- entries ----------------------------------------------------------------------------------------------------------


def _read_entries(path: Path, table: dict[bytes, bytes], sizes: list[int]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    problems = []
    for raw_key, value in table.items():
        key = raw_key.decode(errors="backslashreplace")
        try:
            entry = entries[raw_key.decode()] = read_entry(value)
        except (Malformed, UnicodeDecodeError) as error:
            problems.append(f"{key}: {error}")
        else:
            problems += [f"{key}: {problem}" for problem in place_problems(entry, sizes)]
    raise_if(CheckpointError, str(path), problems)
    return entries


def _overlaps(entries: dict[str, Entry]) -> Iterator[str]:
    spans = sorted((entry.shard, entry.offset, entry.stop, key) for key, entry in entries.items() if entry.nbytes)
    for (shard, _, stop, _), (next_shard, start, _, key) in itertools.pairwise(spans):
        if shard == next_shard and start < stop:
            yield f"{key}: starts at byte {start}, expected {stop} at least: an overlap"


# -- names ------------------------------------------------------------------------------------------------------------


def _names(path: Path, entries: dict[str, Entry], shards: list[Path]) -> dict[str, str]:
    """The key of each weight to its name; a scalar is a counter or a setting, never a weight."""
    graph = entries.get(GRAPH_KEY)
    paths = _graph_names(path, graph, shards[graph.shard]) if graph else {key: name_of(key) for key in entries}
    problems = [f"{key}: in the object graph, but not stored" for key in paths if key not in entries]
    names = {key: name for key, name in paths.items() if key in entries and entries[key].shape}
    problems += [f"{name}: {problem}" for key, name in names.items() for problem in weight_problems(entries[key])]
    if len({*names.values()}) < len(names):
        problems.append("object graph: expected one variable at each attribute path, got several")
    raise_if(CheckpointError, str(path), problems)
    return names


def _graph_names(path: Path, entry: Entry, shard: Path) -> dict[str, str]:
    try:
        if entry.dtype != "string" or entry.shape:
            raise Malformed(f"expected one text, got {entry.dtype} {entry.shape}")
        if entry.nbytes > _MAX_GRAPH_BYTES:
            raise Malformed(f"expected at most {_MAX_GRAPH_BYTES} bytes, got {entry.nbytes}")
        with open(shard, "rb") as file:
            file.seek(entry.offset)
            return variable_names(read_text(file.read(entry.nbytes), entry.checksum))
    except Malformed as error:
        raise CheckpointError(str(path), [f"{GRAPH_KEY}: {error}"]) from None


# -- checksums --------------------------------------------------------------------------------------------------------


def _checksum_problems(entries: dict[str, Entry], shards: list[Path]) -> Iterator[str]:
    """Texts are left out: the object graph is always compared, and no other is used."""
    for key, entry in entries.items():
        if not entry.is_numeric:
            continue
        got = crc32c.masked(_crc_of_run(shards[entry.shard], entry))
        if got != entry.checksum:
            yield f"{key}: expected checksum {entry.checksum:08x}, got {got:08x}: the bytes are damaged"


def _crc_of_run(shard: Path, entry: Entry) -> int:
    crc = 0
    with open(shard, "rb") as file:
        for start in range(entry.offset, entry.stop, _CHUNK_BYTES):
            file.seek(start)
            crc = crc32c.extend(crc, file.read(min(_CHUNK_BYTES, entry.stop - start)))
    return crc


# -- writing ----------------------------------------------------------------------------------------------------------


def write_folder(
    folder: Path,
    tensors: Iterable[PlannedTensor],
    write_tensor: Callable[[IO[bytes], PlannedTensor], None],
    *,
    prefix: str = "ckpt-1",
) -> None:
    """Writes `<prefix>.index`, one data file, and the file `checkpoint` that tells TensorFlow which is the latest.

    With a name such as "model/lm_head/weight", tf.train.Checkpoint(model=m).restore(folder/prefix) restores
    `m.lm_head.weight`. Calls `write_tensor(file, tensor)` for each; it must write exactly `tensor.nbytes` bytes.

    Raises:
        InputError: google-crc32c, which computes the checksums, is not installed.
    """
    crc32c.check_is_fast()
    index: dict[bytes, bytes] = {b"": message([(1, 1), (3, message([(1, _VERSION)]))])}
    names = []
    with open(folder / _data_name(prefix, 0, 1), "wb") as file:
        for tensor in tensors:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            index[key_of(tensor.name).encode()] = _write_tensor(file, tensor, write_tensor)
            names.append(tensor.name)
        index[key_of(COUNTER_NAME).encode()] = _write_counter(file)
        index[GRAPH_KEY.encode()] = _write_graph(file, [*names, COUNTER_NAME])
    (folder / f"{prefix}{_SUFFIX}").write_bytes(table_bytes(index))
    state = f'model_checkpoint_path: "{prefix}"\nall_model_checkpoint_paths: "{prefix}"\n'
    (folder / _STATE_NAME).write_text(state, encoding="utf-8")


class _Checksummed:
    """A file whose bytes are counted into a checksum as they pass."""

    def __init__(self, file: IO[bytes]):
        self._file, self.crc = file, 0

    def write(self, chunk) -> int:
        run = np.asarray(memoryview(chunk).cast("B"))  # of a memoryview, google-crc32c 1.9 would need a copy
        self.crc = crc32c.extend(self.crc, run)
        return self._file.write(chunk)


def _write_tensor(file: IO[bytes], tensor: PlannedTensor, write_tensor: Callable) -> bytes:
    start, checked = file.tell(), _Checksummed(file)
    write_tensor(cast(IO[bytes], checked), tensor)
    assert file.tell() - start == tensor.nbytes, tensor.name
    return entry_bytes(tensor.dtype, tensor.shape, start, tensor.nbytes, checked.crc)


def _write_counter(file: IO[bytes]) -> bytes:
    """How often tf.train.Checkpoint has saved: without it, `restore` would not find all that it looks for."""
    start, value = file.tell(), struct.pack("<q", 1)
    file.write(value)
    return entry_bytes("int64", (), start, len(value), crc32c.extend(0, value))


def _write_graph(file: IO[bytes], names: list[str]) -> bytes:
    start, (stored, crc) = file.tell(), text_bytes(graph_bytes(names))
    file.write(stored)
    return entry_bytes("string", (), start, len(stored), crc)
