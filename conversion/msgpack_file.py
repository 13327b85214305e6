"""The container that Flax saves: one msgpack tree of maps whose leaves are arrays, as extension type 1.

Reads only the heads of its objects, to learn where each array lies, and writes one array at a time. Stored names are
the keys on the way to a leaf, joined by "/". Names, shards and models are not its business. Sources: the msgpack
specification and `flax.serialization` 0.12: an array is (shape, name of the dtype, bytes), one of more than 2^30 bytes
is a map of flat chunks.
"""

import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from conversion.safetensors_file import PlannedTensor
from conversion.stored import DTYPES, MappedFile, StoredTensor
from opt_core.errors import CheckpointError, raise_if

MAX_CHUNK_BYTES = 1 << 30  # of written arrays, as in Flax; of those read any
_MAX_DEPTH = 16
_MAX_OBJECTS = 1 << 17  # OPT's largest has 1540 tensors
_MAX_KEY_BYTES = 512
_ARRAY, _SCALAR = 1, 3  # extension types
_CHUNKED = "__msgpack_chunked_array__"


class MsgpackFile(MappedFile):
    """A mapped file in which an array may consist of several runs."""

    def __init__(self, path: Path, tensors: dict[str, StoredTensor], chunks: dict[str, list[StoredTensor]]):
        super().__init__(path, tensors)
        self._chunks = chunks

    def view(self, name: str) -> np.ndarray:
        """As `MappedFile.view`; a chunked array is a copy."""
        if name not in self._chunks:
            return super().view(name)
        tensor, filled = self.tensors[name], 0
        flat = np.empty(math.prod(tensor.shape), DTYPES[tensor.dtype])
        for chunk in self._chunks[name]:
            size = math.prod(chunk.shape)
            flat[filled : filled + size] = np.frombuffer(self._mapped(), flat.dtype, size, chunk.offset)
            filled += size
        return flat.reshape(tensor.shape)


def open_file(path: Path) -> MsgpackFile:
    """Finds the arrays of a file; reads none.

    Raises:
        CheckpointError: names the key or the byte, what was expected there and what is there.
    """
    with open(path, "rb") as file:
        tree = _Scan(file, path).tree()
    tensors: dict[str, StoredTensor] = {}
    chunks: dict[str, list[StoredTensor]] = {}
    problems: list[str] = []
    for name, leaf in _leaves(tree):
        try:
            tensors[name], pieces = _joined(leaf)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        if pieces:
            chunks[name] = pieces
    raise_if(CheckpointError, str(path), problems)
    return MsgpackFile(path, tensors, chunks)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and _CHUNKED not in value:
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _joined(leaf) -> tuple[StoredTensor, list[StoredTensor]]:
    """A leaf as one array, and the chunks that it consists of, if any; ValueError where they do not add up."""
    if isinstance(leaf, StoredTensor):
        return leaf, []
    if not isinstance(leaf, dict) or leaf.keys() != {_CHUNKED, "shape", "chunks"}:
        raise ValueError(f"expected an array, got {_text(leaf)}")
    shape, chunks = _numbered(leaf["shape"], int), _numbered(leaf["chunks"], StoredTensor)
    if leaf[_CHUNKED] is not True or not _is_shape(shape) or not chunks:
        raise ValueError("expected the shape and the chunks of an array")
    if len({chunk.dtype for chunk in chunks}) > 1 or any(len(chunk.shape) != 1 for chunk in chunks):
        raise ValueError("expected flat chunks of one dtype")
    found = sum(chunk.shape[0] for chunk in chunks)
    if found != math.prod(shape):
        raise ValueError(f"expected chunks of {math.prod(shape)} elements for {tuple(shape)}, got {found}")
    return StoredTensor(chunks[0].dtype, tuple(shape), chunks[0].offset), chunks


def _numbered(values, kind: type) -> list:
    """The values of a map with the keys "0", "1", ..., in their order; empty where it is none, or of other values."""
    if not isinstance(values, dict) or values.keys() != {str(number) for number in range(len(values))}:
        return []
    ordered = [values[str(number)] for number in range(len(values))]
    return ordered if all(type(value) is kind for value in ordered) else []


def _is_shape(shape: list) -> bool:
    return 0 < len(shape) <= 8 and all(type(size) is int and size > 0 for size in shape)


def _text(leaf) -> str:
    return "a map" if isinstance(leaf, dict) else repr(leaf)


class _Scan:
    """Reads the heads of msgpack objects one after the other, and skips the bytes of arrays."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path
        self._size = os.fstat(file.fileno()).st_size
        self._objects = 0

    def tree(self) -> dict[str, Any]:
        """The whole file, which must be one map."""
        tree = self._object(_MAX_DEPTH)
        if not isinstance(tree, dict):
            raise self._error(f"expected a map of arrays, as Flax saves it, got {_text(tree)}")
        if self._file.tell() != self._size:
            raise self._error(f"{self._size - self._file.tell()} bytes follow the map")
        return tree

    def _object(self, depth: int) -> Any:
        self._objects += 1
        if depth == 0:
            raise self._error(f"expected at most {_MAX_DEPTH} maps in one another")
        if self._objects > _MAX_OBJECTS:
            raise self._error(f"expected at most {_MAX_OBJECTS} objects")
        code = self._number("B")
        if (count := self._length(code, 0x80, 0x8F, {0xDE: "H", 0xDF: "I"})) is not None:
            return self._map(count, depth)
        if code in _EXTENSIONS:
            return self._extension(code)
        if code in (0xC2, 0xC3):
            return code == 0xC3
        return self._integer(code)

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._string(_MAX_KEY_BYTES)
            if key in found or not key or "/" in key:
                raise self._error(f"key {key[:100]!r}: expected one without '/' that occurs once")
            found[key] = self._object(depth - 1)
        return found

    def _extension(self, code: int) -> StoredTensor:
        format = _EXTENSIONS[code]
        length = self._number(format) if isinstance(format, str) else format
        kind, start = self._number("b"), self._file.tell()
        if kind not in (_ARRAY, _SCALAR):
            raise self._error(f"expected extension type {_ARRAY} or {_SCALAR}, got {kind}")
        if start + length > self._size:
            raise self._error(f"truncated: an array of {length} bytes, {self._size - start} are left in the file")
        tensor, stop = self._array()
        if stop != start + length:
            raise self._error(f"expected an array of {length} bytes with its shape, got {stop - start}")
        self._file.seek(stop)
        return tensor

    def _array(self) -> tuple[StoredTensor, int]:
        if self._number("B") != 0x93:
            raise self._error("expected the shape, dtype and bytes of an array")
        rank = self._length(self._number("B"), 0x90, 0x9F, {})
        shape = tuple(self._integer(self._number("B")) for _ in range(min(rank or 0, 9)))
        if rank is None or len(shape) > 8 or 0 in shape:
            raise self._error("expected the shape of an array: at most 8 positive integers")
        dtype = self._string(64)
        if dtype not in DTYPES:
            raise self._error(f"expected a dtype of {', '.join(DTYPES)}, got {dtype!r}")
        length = self._length(self._number("B"), 1, 0, {0xC4: "B", 0xC5: "H", 0xC6: "I"})
        tensor = StoredTensor(dtype, shape, self._file.tell())
        if length != tensor.nbytes:
            raise self._error(f"expected {tensor.nbytes} bytes for {dtype} {shape}, got {length}")
        return tensor, tensor.offset + length

    def _string(self, longest: int) -> str:
        length = self._length(self._number("B"), 0xA0, 0xBF, {0xD9: "B", 0xDA: "H", 0xDB: "I"})
        if length is None or length > longest:
            raise self._error(f"expected a text of at most {longest} bytes")
        try:
            return self._read(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self._error("expected a text in UTF-8") from None

    def _integer(self, code: int) -> int:
        if code <= 0x7F:
            return code
        if code not in _INTEGERS:
            raise self._error(f"expected a map, an array or a size, as in Flax, got an object of type 0x{code:02x}")
        return self._number(_INTEGERS[code])

    def _length(self, code: int, first: int, last: int, others: dict[int, str]) -> int | None:
        """The length that the code of an object holds, or that follows it; None for an object of another kind."""
        if first <= code <= last:
            return code - first
        return self._number(others[code]) if code in others else None

    def _number(self, format: str) -> int:
        return struct.unpack(f">{format}", self._read(struct.calcsize(f">{format}")))[0]

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise self._error("truncated: the file ends here")
        return data

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(str(self._path), [f"byte {self._file.tell()}: {problem}"])


_INTEGERS = {0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q"}
_EXTENSIONS: dict[int, str | int] = {0xC7: "B", 0xC8: "H", 0xC9: "I", 0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


# -- writing ----------------------------------------------------------------------------------------------------------


def write_file(
    file: BinaryIO, tensors: Iterable[PlannedTensor], write_tensor: Callable[[IO[bytes], PlannedTensor], None]
) -> None:
    """Writes the tree that the names of `tensors` span, calling `write_tensor(file, tensor)` for each.

    `write_tensor` must write exactly `tensor.nbytes` bytes.
    """
    tree: dict[str, Any] = {}
    for tensor in tensors:
        *parents, last = tensor.name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = tensor
    _write_node(file, tree, write_tensor)
    file.flush()
    os.fsync(file.fileno())


def _write_node(file: BinaryIO, node, write_tensor: Callable) -> None:
    if isinstance(node, PlannedTensor):
        pieces = _Pieces(file, node)
        write_tensor(pieces, node)
        assert pieces.written == node.nbytes, node.name
        return
    file.write(_map_head(len(node)))
    for key, value in node.items():
        file.write(_packed(key))
        _write_node(file, value, write_tensor)


class _Pieces:
    """A file for the bytes of one array, which puts the heads of the array and of its chunks before them."""

    def __init__(self, file: BinaryIO, tensor: PlannedTensor):
        self._file, self._tensor = file, tensor
        self._is_chunked = tensor.nbytes > MAX_CHUNK_BYTES
        self._left = 0  # bytes of the current piece
        self.written = 0
        if self._is_chunked:
            shape = {str(number): size for number, size in enumerate(tensor.shape)}
            head = [_packed(item) for item in (_CHUNKED, True, "shape", shape, "chunks")]
            count = -(-tensor.nbytes // self._piece_bytes)
            file.write(_map_head(3) + b"".join(head) + _map_head(count))

    @property
    def _piece_bytes(self) -> int:
        itemsize = DTYPES[self._tensor.dtype].itemsize
        return max(1, MAX_CHUNK_BYTES // itemsize) * itemsize if self._is_chunked else self._tensor.nbytes

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        start = 0
        while start < len(data):
            if self._left == 0:
                self._begin()
            step = min(self._left, len(data) - start)
            self._file.write(data[start : start + step])
            start, self._left, self.written = start + step, self._left - step, self.written + step
        return len(data)

    def _begin(self) -> None:
        self._left = min(self._piece_bytes, self._tensor.nbytes - self.written)
        shape = self._tensor.shape
        if self._is_chunked:
            shape = (self._left // DTYPES[self._tensor.dtype].itemsize,)
            self._file.write(_packed(str(self.written // self._piece_bytes)))
        payload = b"\x93" + _packed(list(shape)) + _packed(self._tensor.dtype) + _binary_head(self._left)
        self._file.write(_extension_head(len(payload) + self._left) + payload)


def _packed(value) -> bytes:
    import msgpack

    return msgpack.packb(value)


def _map_head(count: int) -> bytes:
    import msgpack

    return msgpack.Packer().pack_map_header(count)


def _binary_head(length: int) -> bytes:
    return _head(length, (0xC4, 0xC5, 0xC6))


def _extension_head(length: int) -> bytes:
    return _head(length, (0xC7, 0xC8, 0xC9)) + bytes([_ARRAY])


def _head(length: int, codes: tuple[int, int, int]) -> bytes:
    """The shortest head of an object of `length` bytes: one, two or four bytes of length after its code."""
    size = 0 if length < 1 << 8 else 1 if length < 1 << 16 else 2
    return struct.pack(f">B{'BHI'[size]}", codes[size], length)
