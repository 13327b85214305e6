"""The safetensors container: eight bytes of header length, a JSON header, then the tensors without gaps.

Reads the header strictly (the `safetensors` package lets duplicate keys pass) and writes one tensor at a time. Names,
shards and models are not its business. Source: the format's description in the safetensors README.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from conversion.stored import DTYPES, StoredTensor
from opt_core.errors import CheckpointError, raise_if
from opt_core.json_file import unique_keys

MAX_HEADER_BYTES = 1 << 22  # the format allows 100 MB; OPT's largest, 1540 tensors, takes 0.3 MB
ALIGNMENT = 64  # of the first tensor in files that are written

_TO_NAME = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FROM_NAME = {name: word for word, name in _TO_NAME.items()}


class Header(NamedTuple):
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Parses and checks a header; reads no tensor.

    Raises:
        CheckpointError: lists every entry that disagrees with the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = _header_length(file, size, path)
        fields = _parse(file.read(length), path)
    metadata = fields.pop("__metadata__", {})
    problems = [] if _is_text_map(metadata) else ["__metadata__: expected an object of strings"]
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in fields.items():
        problem = _entry_problem(entry)
        if problem:
            problems.append(f"{name}: {problem}")
            continue
        start, stop = entry["data_offsets"]
        spans.append((start, stop, name))
        dtype = _TO_NAME.get(entry["dtype"], entry["dtype"])
        tensors[name] = StoredTensor(dtype, tuple(entry["shape"]), 8 + length + start)
    raise_if(CheckpointError, str(path), problems or _span_problems(spans, size - 8 - length))
    return Header(tensors, metadata)


def _header_length(file: BinaryIO, size: int, path: Path) -> int:
    first = file.read(8)
    if len(first) < 8:
        raise CheckpointError(str(path), [f"expected a safetensors file, got {size} bytes"])
    (length,) = struct.unpack("<Q", first)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(str(path), [f"header: expected at most {MAX_HEADER_BYTES} bytes, got {length}"])
    if length > size - 8:
        raise CheckpointError(
            str(path), [f"truncated: the header says {length} bytes, {size - 8} are left in the file"]
        )
    return length


def _parse(header: bytes, path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(header.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), [f"header: not valid JSON: {error}"]) from None
    if not isinstance(fields, dict):
        raise CheckpointError(str(path), [f"header: expected a JSON object, got {type(fields).__name__}"])
    return fields


def _is_text_map(value) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _entry_problem(entry) -> str | None:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "expected an object of dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        return f"dtype: expected a word, got {dtype!r}"
    if not _are_counts(shape) or 0 in shape or len(shape) > 8:
        return f"shape: expected at most 8 positive integers, got {str(shape)[:100]}"
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets: expected a start and an end, got {str(offsets)[:100]}"
    if dtype in _TO_NAME:
        expected = math.prod(shape) * DTYPES[_TO_NAME[dtype]].itemsize
        if expected != offsets[1] - offsets[0]:
            return f"expected {expected} bytes for {dtype} {shape}, got {offsets[1] - offsets[0]}"
    return None


def _are_counts(value) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _span_problems(spans: list[tuple[int, int, str]], payload: int) -> Iterable[str]:
    reached = 0
    for start, stop, name in sorted(spans):
        if start != reached:
            yield f"{name}: starts at byte {start} of the data, expected {reached}: a gap or an overlap"
        if stop > payload:
            yield f"{name}: truncated, ends at byte {stop} of {payload} bytes of data"
        reached = max(reached, stop)
    if reached < payload:
        yield f"{payload - reached} bytes follow the last tensor"


# -- writing ----------------------------------------------------------------------------------------------------------


class PlannedTensor(NamedTuple):
    """What is known of a tensor before it is read."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_file(
    file: BinaryIO,
    tensors: Iterable[PlannedTensor],
    write_tensor: Callable[[IO[bytes], PlannedTensor], None],
    framework: str = "pt",
) -> None:
    """Writes a header for all `tensors`, then calls `write_tensor(file, tensor)` for each, widest dtype first.

    The order keeps every tensor aligned to its item size. `write_tensor` must write exactly `tensor.nbytes` bytes.
    """
    ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    header = _header_bytes(ordered, framework)
    file.write(struct.pack("<Q", len(header)) + header)
    for tensor in ordered:
        before = file.tell()
        write_tensor(file, tensor)
        assert file.tell() - before == tensor.nbytes, tensor.name
    file.flush()
    os.fsync(file.fileno())


def _header_bytes(tensors: Iterable[PlannedTensor], framework: str) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": framework}}
    start = 0
    for tensor in tensors:
        stop = start + tensor.nbytes
        fields[tensor.name] = dict(dtype=_FROM_NAME[tensor.dtype], shape=tensor.shape, data_offsets=[start, stop])
        start = stop
    header = json.dumps(fields, separators=(",", ":")).encode()
    return header + b" " * (-(8 + len(header)) % ALIGNMENT)
