"""One entry of a TensorFlow checkpoint's index, and the form in which text is stored; see `tensor_bundle`.

Sources: `tensorflow/core/protobuf/tensor_bundle.proto`, `tensorflow/core/framework/types.proto` and `WriteStringTensor`
in `tensorflow/core/util/tensor_bundle/tensor_bundle.cc` of TensorFlow 2.21.
"""

import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

from conversion import crc32c
from conversion.tf_checkpoint.protobuf_wire import (
    Fixed32,
    Malformed,
    bytes_of,
    fields,
    message,
    number_of,
    read_varint,
    values,
    varint,
)

_WORD = struct.Struct("<I")

# Number of a dtype in types.proto -> its name and the bytes of an item. Text has no fixed size.
_DTYPES = {
    1: ("float32", 4), 2: ("float64", 8), 3: ("int32", 4), 4: ("uint8", 1), 5: ("int16", 2), 6: ("int8", 1),
    7: ("string", 0), 8: ("complex64", 8), 9: ("int64", 8), 10: ("bool", 1), 14: ("bfloat16", 2), 17: ("uint16", 2),
    18: ("complex128", 16), 19: ("float16", 2), 22: ("uint32", 4), 23: ("uint64", 8),
}  # fmt: skip
_NUMBERS = {name: number for number, (name, _) in _DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies, and its masked checksum."""

    dtype: str  # of text "string"; of a kind that is not known, TensorFlow's number for it
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int
    checksum: int

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes

    @property
    def is_numeric(self) -> bool:
        return self.dtype in _NUMBERS and self.dtype != "string"


def read_entry(data: bytes) -> Entry:
    """Raises Malformed where it is none, or one of what is not read: a slice, a shape that is not known."""
    content = values(data)
    if 7 in content:
        raise Malformed("expected a whole tensor, got one in slices (of a partitioned variable)")
    number = number_of(content, 1)
    name, _ = _DTYPES.get(number, (f"number {number} of TensorFlow", 0))
    shape = _read_shape(bytes_of(content.get(2, b"")))
    return Entry(name, shape, *(number_of(content, field) for field in (3, 4, 5, 6)))


def _read_shape(data: bytes) -> tuple[int, ...]:
    shape = []
    for number, value in fields(data):
        if number == 3 and value:
            raise Malformed("shape: expected a known one, got one of unknown rank")
        if number == 2:
            shape.append(number_of(values(bytes_of(value)), 1))
    if len(shape) > 8 or any(size < 0 for size in shape):
        raise Malformed(f"shape: expected at most 8 sizes, got {str(shape)[:100]}")
    return tuple(shape)


def place_problems(entry: Entry, sizes: list[int]) -> Iterator[str]:
    """What does not agree with the data files, of which `sizes` are the bytes."""
    if not 0 <= entry.shard < len(sizes):
        yield f"expected one of {len(sizes)} data files, got number {entry.shard}"
    elif entry.offset < 0 or entry.nbytes < 0 or entry.stop > sizes[entry.shard]:
        text = f"truncated, or a wrong place: bytes {entry.offset} to {entry.stop}"
        yield f"{text} of the {sizes[entry.shard]} in data file {entry.shard}"
    expected = math.prod(entry.shape) * _DTYPES[_NUMBERS[entry.dtype]][1] if entry.is_numeric else entry.nbytes
    if expected != entry.nbytes:
        yield f"expected {expected} bytes for {entry.dtype} {entry.shape}, got {entry.nbytes}"


def weight_problems(entry: Entry) -> Iterator[str]:
    """Why it cannot be a weight."""
    if not entry.is_numeric:
        yield f"expected numbers, got a dtype of {entry.dtype}"
    if 0 in entry.shape:
        yield f"expected positive sizes, got {entry.shape}"


def entry_bytes(dtype: str, shape: tuple[int, ...], start: int, nbytes: int, crc: int) -> bytes:
    """The inverse of `read_entry`, from a checksum that is not masked yet."""
    sizes = message((2, message([(1, size)])) for size in shape)
    place = [(4, start), (5, nbytes), (6, Fixed32(crc32c.masked(crc)))]
    return message([(1, _NUMBERS[dtype]), (2, sizes), *place])


# -- text -------------------------------------------------------------------------------------------------------------


def read_text(stored: bytes, checksum: int) -> bytes:
    """The one text of an entry: stored are its length, a checksum of the length, and its bytes."""
    length, start = read_varint(stored, 0)
    header, text = stored[start : start + _WORD.size], stored[start + _WORD.size :]
    if len(text) != length or checksum != crc32c.masked(_crc_of_text(text, header)):
        raise Malformed(f"expected {length} bytes with checksum {checksum:08x}: the bytes are damaged")
    return text


def text_bytes(text: bytes) -> tuple[bytes, int]:
    """The inverse of `read_text`: what is stored, and its checksum, not masked."""
    header = _WORD.pack(crc32c.masked(crc32c.extend(0, _WORD.pack(len(text)))))
    return varint(len(text)) + header + text, _crc_of_text(text, header)


def _crc_of_text(text: bytes, header: bytes) -> int:
    """Of the length in four bytes, whatever is stored, then of the rest as it is stored."""
    return crc32c.extend(0, _WORD.pack(len(text)) + header + text)
