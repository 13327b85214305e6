"""The tree of an OCDBT database: where the bytes of every value lie. Reads its nodes, and no values.

TensorStore has a reader too, which a file of 240 KB made take 2.4 GB: keys share prefixes, and it writes each out in
full. Here all sizes are bounded first, and only the unpacking of a node is left to TensorStore, which has Zstandard.
Source: `tensorstore/kvstore/ocdbt/format` of TensorStore 0.1.86.
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from conversion import crc32c
from conversion.orbax import zstd_frame
from opt_core.errors import MissingFrameworkError

MANIFEST = "manifest.ocdbt"
_MAX_NODES = 1 << 12
_MAX_KEYS = 1 << 17  # OPT's largest, 1540 tensors, takes some 12,000
_MAX_NAME_BYTES = 512  # of a key or a path
_MAX_TEXT_BYTES = 1 << 24  # of the keys of a node, or of its paths, written out
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_NODE_BYTES = 1 << 23  # of all nodes together; Orbax writes some 0.3 KB for each tensor
_MAGIC = {"manifest": 0x0CDB3A2A, "node": 0x0CDB20DE}
_HEAD, _TAIL = struct.Struct(">4sQBB"), 4  # magic, length (little-endian), version, packing; CRC-32C
_CONFIG_BYTES = 16  # the identity of the database, before its settings
_Text = TypeVar("_Text", bytes, str)
_SIZE = re.compile(r"(?:uncompressed byte|Uncompressed chunk is) ([0-9]{1,9})\b")


class Value(NamedTuple):
    """The bytes under one key: a run of a file below the folder, or, where they are few, the bytes themselves."""

    file: str
    offset: int
    length: int
    inline: bytes | None = None


class _Place(NamedTuple):
    """A run of a file, and the path to which the files that it names are relative."""

    file: str
    base: str
    offset: int
    length: int


def import_tensorstore():
    """The `tensorstore` package.

    Raises:
        MissingFrameworkError: says what to install.
    """
    try:
        import tensorstore
    except ImportError:
        text = "Orbax checkpoints are read and written through tensorstore: pip install tensorstore"
        raise MissingFrameworkError(text) from None
    return tensorstore


def read_values(folder: Path, sizes: dict[str, int]) -> dict[str, Value]:
    """Every key of the database in a folder, whose files have these `sizes`.

    Raises:
        ValueError: says what is damaged, missing, larger than its bounds, or lies on something else.
    """
    found: dict[str, Value] = {}
    for key, value in _leaf_entries(folder, sizes):
        name = key.decode("utf-8")
        if name in found or len(found) == _MAX_KEYS:
            raise ValueError(f"{name[:200]}: expected at most {_MAX_KEYS} keys, each once")
        if value.inline is None:
            _check_place(value, sizes)
        found[name] = value
    _check_overlaps(found)
    return found


def _leaf_entries(folder: Path, sizes: dict[str, int]) -> Iterator[tuple[bytes, Value]]:
    root, height = _read_manifest(_unpacked(folder, sizes, Value(MANIFEST, 0, sizes[MANIFEST]), "manifest"))
    waiting = [(root, height, b"")] if root else []
    nodes = unpacked = 0
    while waiting:
        place, height, prefix = waiting.pop()
        reader = _unpacked(folder, sizes, Value(place.file, place.offset, place.length), "node")
        nodes, unpacked = nodes + 1, unpacked + reader.size
        if nodes > _MAX_NODES or unpacked > _MAX_NODE_BYTES:
            raise ValueError(f"expected at most {_MAX_NODES} nodes, and {_MAX_NODE_BYTES} bytes of them together")
        if (found := reader.byte()) != height:
            raise ValueError(f"{place.file}: expected a node of height {height}, got {found}")
        if height:
            waiting += [(child, height - 1, _joined(prefix, key)) for key, child in _read_inner(reader, place.base)]
        else:
            yield from ((_joined(prefix, key), value) for key, value in _read_leaf(reader, place.base))


def _joined(start: _Text, end: _Text) -> _Text:
    if len(start) + len(end) > _MAX_NAME_BYTES:
        raise ValueError(f"expected keys and paths of at most {_MAX_NAME_BYTES} bytes")
    return start + end


def _check_place(value: Value, sizes: dict[str, int]) -> None:
    if value.file not in sizes:
        raise ValueError(f"{value.file[:200]}: missing, expected {value.length} bytes of it")
    stop = value.offset + value.length
    if stop > sizes[value.file]:
        raise ValueError(f"{value.file}: truncated, expected {stop} bytes, got {sizes[value.file]}")


def _check_overlaps(values: dict[str, Value]) -> None:
    stop, before, last = 0, "", ""
    for value, key in sorted((value, key) for key, value in values.items() if value.inline is None):
        if value.file == before and value.offset < stop:
            raise ValueError(f"{key[:200]}: lies on bytes of {last[:200]}")
        stop, before, last = value.offset + value.length, value.file, key


# -- the parts of a node ----------------------------------------------------------------------------------------------


class _Reader:
    """Takes numbers and bytes off the front; ValueError where there are none left."""

    def __init__(self, data: bytes):
        self._data, self._position = data, 0

    @property
    def size(self) -> int:
        return len(self._data)

    def take(self, count: int) -> bytes:
        start, self._position = self._position, self._position + count
        if self._position > len(self._data):
            raise ValueError("a truncated node")
        return self._data[start : self._position]

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        return self.column(1)[0]

    def count(self, largest: int) -> int:
        value = self.number()
        if value > largest:
            raise ValueError(f"expected at most {largest} entries, got {value}")
        return value

    def column(self, count: int) -> list[int]:
        """Numbers in bytes of seven bits, of which the eighth says that more follow."""
        data, position, found = self._data, self._position, []
        try:
            for _ in range(count):
                byte, shift = data[position], 7
                value, position = byte & 0x7F, position + 1
                while byte & 0x80:
                    byte, position = data[position], position + 1
                    value, shift = value | (byte & 0x7F) << shift, shift + 7
                    if shift > 70:
                        raise ValueError("expected a number of 64 bits")
                found.append(value)
        except IndexError:
            raise ValueError("a truncated node") from None
        self._position = position
        return found

    def texts(self, prefixes: list[int], suffixes: list[int]) -> list[bytes]:
        """Texts of which each shares a prefix with the one before."""
        if sum(prefixes) + sum(suffixes) > _MAX_TEXT_BYTES:
            raise ValueError(f"expected keys and paths of at most {_MAX_TEXT_BYTES} bytes")
        found, last = [], b""
        for prefix, suffix in zip(prefixes, suffixes, strict=True):
            if prefix > len(last):
                raise ValueError("expected a prefix of the text before")
            last = last[:prefix] + self.take(suffix)
            found.append(last)
        return found

    def files(self, base: str) -> list[tuple[str, str]]:
        """The files that a node names, and for each the path to which those are relative that it names."""
        count = self.count(_MAX_KEYS)
        prefixes, suffixes = [0] * min(count, 1) + self.column(max(count - 1, 0)), self.column(count)
        bases = self.column(count)
        paths = [path.decode("utf-8") for path in self.texts(prefixes, suffixes)]
        return [(_joined(base, path), base + path[:length]) for path, length in zip(paths, bases, strict=True)]

    def places(self, files: list[tuple[str, str]], count: int) -> list[_Place]:
        """Places of nodes, with statistics that are not needed."""
        numbers, offsets, lengths = (self.column(count) for _ in range(3))
        self.column(3 * count)
        if any(number >= len(files) for number in numbers):
            raise ValueError("expected the number of a file")
        runs = zip(numbers, offsets, lengths, strict=True)
        return [_Place(*files[number], offset, length) for number, offset, length in runs]


def _read_manifest(reader: _Reader) -> tuple[_Place | None, int]:
    """The root of the latest version, and its height."""
    reader.take(_CONFIG_BYTES)
    kind, _, _, _, packing = reader.number(), reader.number(), reader.number(), reader.byte(), reader.number()
    if kind or packing > 1:
        raise ValueError(f"{MANIFEST}: expected a manifest in one file, got one of kind {kind}")
    reader.take(4 * packing)
    files = reader.files("")
    count = reader.count(_MAX_NODES)
    reader.column(count)
    heights = [reader.byte() for _ in range(count)]
    places = reader.places(files, count)
    if not places or places[-1].length == (1 << 64) - 1:
        return None, 0
    return places[-1], heights[-1]


def _read_keys(reader: _Reader, *, is_inner: bool) -> list[bytes]:
    """The keys of a leaf, or what the keys below each child of an inner node begin with."""
    count = reader.count(_MAX_KEYS)
    prefixes, suffixes = [0] * min(count, 1) + reader.column(max(count - 1, 0)), reader.column(count)
    shared = reader.column(count) if is_inner else None
    keys = reader.texts(prefixes, suffixes)
    return [key[:length] for key, length in zip(keys, shared, strict=True)] if shared else keys


def _read_inner(reader: _Reader, base: str) -> Iterator[tuple[bytes, _Place]]:
    files = reader.files(base)
    keys = _read_keys(reader, is_inner=True)
    return zip(keys, reader.places(files, len(keys)), strict=True)


def _read_leaf(reader: _Reader, base: str) -> Iterator[tuple[bytes, Value]]:
    files = reader.files(base)
    keys = _read_keys(reader, is_inner=False)
    lengths, kinds = reader.column(len(keys)), reader.take(len(keys))
    if any(kind > 1 for kind in kinds):
        raise ValueError("expected values in the node or in files")
    numbers = reader.column(sum(kinds))
    places = iter(list(zip(numbers, reader.column(len(numbers)), strict=True)))
    for key, length, is_elsewhere in zip(keys, lengths, kinds, strict=True):
        if not is_elsewhere:
            yield key, Value("", 0, length, reader.take(length))
            continue
        number, offset = next(places)
        if number >= len(files):
            raise ValueError(f"{key[:200]!r}: expected the number of a file")
        yield key, Value(files[number][0], offset, length)


# -- unpacking --------------------------------------------------------------------------------------------------------


def _unpacked(folder: Path, sizes: dict[str, int], place: Value, kind: str) -> _Reader:
    """What a manifest or a node holds, its length and its size checked first."""
    _check_place(place, sizes)
    largest = _MAX_MANIFEST_BYTES if kind == "manifest" else _MAX_NODE_BYTES
    if not _HEAD.size + _TAIL <= place.length <= largest:
        raise ValueError(f"{place.file}: expected a {kind} of at most {largest} bytes, got {place.length}")
    with open(folder / place.file, "rb") as file:
        file.seek(place.offset)
        data = file.read(place.length)
    magic, _, version, packing = _HEAD.unpack_from(data)
    if (int.from_bytes(magic, "big"), version) != (_MAGIC[kind], 0) or packing > 1:
        raise ValueError(f"{place.file}: expected a {kind} at byte {place.offset}, got {data[:8].hex()}")
    if crc32c.extend(0, data[:-_TAIL]) != int.from_bytes(data[-_TAIL:], "little"):
        raise ValueError(f"{place.file}: damaged, its checksum does not agree at byte {place.offset}")
    content = data[_HEAD.size : -_TAIL]
    if not packing:
        return _Reader(content)
    if (bound := zstd_frame.largest_size(memoryview(content))) > largest:
        raise ValueError(f"{place.file}: expected a {kind} that unpacks to {largest} bytes at most, got {bound}")
    return _Reader(_unpack(content, bound))


def _unpack(frame: bytes, bound: int) -> bytes:
    """The bytes in a Zstandard frame, read as the one chunk of an array.

    A frame need not say its size, and an array must have one: asked for too much, TensorStore says how much there is.
    """
    size = zstd_frame.declared_size(memoryview(frame))
    try:
        return _read_chunk(frame, min(size, bound) if size is not None else bound)
    except ValueError as error:
        if size is not None or not (match := _SIZE.search(str(error))):
            raise
        return _read_chunk(frame, min(int(match[1]), bound))


def _read_chunk(frame: bytes, size: int) -> bytes:
    tensorstore = import_tensorstore()
    context = tensorstore.Context()
    tensorstore.KvStore.open("memory://", context=context).result()["0"] = frame
    metadata = {"shape": [size], "chunks": [size], "dtype": "|u1", "compressor": {"id": "zstd"}, "filters": None}
    spec = {"driver": "zarr", "kvstore": "memory://", "metadata": {**metadata, "fill_value": None, "order": "C"}}
    return tensorstore.open(spec, create=True, context=context).result().read().result().tobytes()
