"""One Zarr array as Orbax writes it, of version 2 or 3: its metadata, and whether its chunks add up to its shape.

A chunk that is missing would be read as zeros, one of hostile make may unpack to anything: both are found before
TensorStore, whose business it is, decodes a chunk. Sources: the Zarr specifications 2 and 3 with the sharding codec,
and `_build_zarr2_metadata` and `_build_zarr3_metadata` of Orbax 0.12.8.
"""

import json
import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from conversion.orbax import zstd_frame
from conversion.orbax.chunk_store import ChunkStore
from conversion.stored import DTYPES
from opt_core.json_file import unique_keys

METADATA_KEYS = {2: ".zarray", 3: "zarr.json"}
_MAX_METADATA_BYTES = 1 << 16
_MAX_COMPRESSION = 1000  # bytes declared for one stored; of weights not even two
_SMALL_BYTES = 1 << 20  # of arrays that may be compressed more, such as those of a new norm
_SHORTEST_BLOCKS = 16  # of compressed blocks that stand for a full one, where the encoder splits them
_DTYPES_2 = {DTYPES[name].str: name for name in ("float64", "float32", "float16")} | {"bfloat16": "bfloat16"}
_INDEX = struct.Struct("<QQI")  # of a shard with one chunk: offset, length, CRC-32C
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


class ZarrArray(NamedTuple):
    """What the metadata of an array says."""

    dtype: str  # a key of DTYPES, or Zarr's own word
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    version: int
    separator: str = "/"
    is_compressed: bool = False
    is_sharded: bool = False  # each chunk followed by an index

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * DTYPES[self.dtype].itemsize

    @property
    def chunk_counts(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.chunk, strict=True))

    def chunk_keys(self) -> Iterator[str]:
        for number in range(math.prod(self.chunk_counts)):
            numbers = [str(place) for place in _unravel(number, self.chunk_counts)]
            yield self.separator.join(["c", *numbers] if self.version == 3 else numbers or ["0"])


def _unravel(number: int, counts: tuple[int, ...]) -> list[int]:
    """The position of a chunk in a grid, whose ranges may be too long for `itertools.product`."""
    position = []
    for count in reversed(counts):
        number, place = divmod(number, count)
        position.append(place)
    return position[::-1]


def read_metadata(store: ChunkStore, name: str, version: int) -> ZarrArray:
    """The array whose keys start with `name`.

    Raises:
        ValueError: says what is missing, or not as Orbax writes it.
    """
    key = f"{name}/{METADATA_KEYS[version]}"
    if key not in store.values:
        raise ValueError(f"{METADATA_KEYS[version]} is missing")
    if store.values[key].length > _MAX_METADATA_BYTES:
        raise ValueError(f"expected at most {_MAX_METADATA_BYTES} bytes of metadata")
    try:
        fields = json.loads(bytes(store.read(key)), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{METADATA_KEYS[version]} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{METADATA_KEYS[version]}: expected a JSON object, got {type(fields).__name__}")
    array = _of_version_2(fields) if version == 2 else _of_version_3(fields)
    if not _are_lengths(array.shape) or not _are_lengths(array.chunk) or len(array.shape) != len(array.chunk):
        raise ValueError(f"expected at most 8 axes of positive length, got {_text([array.shape, array.chunk])}")
    if any(step > size for size, step in zip(array.shape, array.chunk, strict=True)):
        raise ValueError(f"expected chunks no larger than {array.shape}, got {array.chunk}")
    return array


def _of_version_2(fields: dict[str, Any]) -> ZarrArray:
    _check_keys(fields, "zarr_format shape chunks dtype compressor fill_value order filters", "dimension_separator")
    compressor, separator = fields["compressor"], fields.get("dimension_separator", ".")
    _check("zarr_format", fields["zarr_format"], [2])
    _check("order", fields["order"], ["C"])
    _check("filters", fields["filters"], [None])
    _check("dimension_separator", separator, [".", "/"])
    if compressor is not None and not (isinstance(compressor, dict) and compressor.get("id") == "zstd"):
        raise ValueError(f"compressor: expected zstd or none, got {_text(compressor)}")
    dtype = str(fields["dtype"])
    shape, chunk = _axes(fields["shape"]), _axes(fields["chunks"])
    return ZarrArray(_DTYPES_2.get(dtype, dtype[:40]), shape, chunk, 2, separator, compressor is not None)


def _of_version_3(fields: dict[str, Any]) -> ZarrArray:
    required = "zarr_format node_type shape data_type chunk_grid chunk_key_encoding codecs fill_value"
    _check_keys(fields, required, "attributes dimension_names storage_transformers")
    _check("zarr_format", fields["zarr_format"], [3])
    _check("node_type", fields["node_type"], ["array"])
    _check("storage_transformers", fields.get("storage_transformers", []), [[]])
    encoding = [{"name": "default"}, {"name": "default", "configuration": {"separator": "/"}}]
    _check("chunk_key_encoding", fields["chunk_key_encoding"], encoding)
    grid, chunk = fields["chunk_grid"], _chunk_shape(fields["chunk_grid"])
    _check("chunk_grid", grid, [{"name": "regular", "configuration": {"chunk_shape": list(chunk)}}])
    is_sharded, codecs = _without_sharding(fields["codecs"], chunk)
    dtype = str(fields["data_type"])[:40]
    return ZarrArray(dtype, _axes(fields["shape"]), chunk, 3, "/", _is_compressed(codecs, dtype), is_sharded)


def _chunk_shape(value) -> tuple[int, ...]:
    configuration = value.get("configuration") if isinstance(value, dict) else None
    return _axes(configuration.get("chunk_shape") if isinstance(configuration, dict) else None)


def _without_sharding(codecs, chunk: tuple[int, ...]) -> tuple[bool, Any]:
    """Whether each chunk is a shard that holds itself alone, and the codecs of what is in it."""
    first = codecs[0] if isinstance(codecs, list) and len(codecs) == 1 else None
    if not isinstance(first, dict) or first.get("name") != "sharding_indexed":
        return False, codecs
    settings = {"index_location": "end", **first["configuration"]} if _chunk_shape(first) == chunk else {}
    inner = settings.pop("codecs", None)
    index = [_BYTES, {"name": "crc32c"}]
    expected = {"chunk_shape": list(chunk), "index_codecs": index, "index_location": "end"}
    _check("sharding_indexed", settings, [expected])
    return True, inner


def _is_compressed(codecs, dtype: str) -> bool:
    if not isinstance(codecs, list) or not codecs or codecs[0] not in ([_BYTES] if dtype in DTYPES else codecs):
        raise ValueError(f"codecs: expected little-endian bytes, got {_text(codecs)}")
    names = [codec.get("name") if isinstance(codec, dict) else None for codec in codecs[1:]]
    if names not in ([], ["zstd"]):
        raise ValueError(f"codecs: expected zstd or none, got {_text(codecs)}")
    return bool(names)


def _check_keys(fields: dict[str, Any], required: str, optional: str) -> None:
    missing = set(required.split()) - fields.keys()
    unknown = fields.keys() - {*required.split(), *optional.split()}
    if missing or unknown:
        raise ValueError(f"missing {sorted(missing)}, unexpected {_text(sorted(unknown))}")


def _check(field: str, value, expected: list) -> None:
    if value not in expected or isinstance(value, bool):
        raise ValueError(f"{field}: expected {_text(expected[0])}, got {_text(value)}")


def _axes(value) -> tuple:
    return tuple(value) if isinstance(value, list) else (-1,)


def _are_lengths(shape: tuple) -> bool:
    return len(shape) <= 8 and all(type(size) is int and 0 < size < 1 << 48 for size in shape)


def _text(value) -> str:
    return str(value)[:200]


# -- chunks -----------------------------------------------------------------------------------------------------------


def chunks_problem(store: ChunkStore, name: str, array: ZarrArray) -> str | None:
    """What is wrong with the number or the sizes of an array's chunks; reads none of them."""
    count, stored = math.prod(array.chunk_counts), 0
    for key in (f"{name}/{key}" for key in array.chunk_keys()):
        if key not in store.values:
            return f"{key}: missing, one of {count} chunks of {array.shape}; it would be read as zeros"
        length = store.values[key].length - (_INDEX.size if array.is_sharded else 0)
        if not array.is_compressed and length != array.chunk_bytes:
            return f"{key}: expected {array.chunk_bytes} bytes for {array.dtype} {array.chunk}, got {length}"
        stored += length
    if count * array.chunk_bytes > max(_MAX_COMPRESSION * stored, _SMALL_BYTES):
        return f"expected at least one byte for {_MAX_COMPRESSION} of {array.dtype} {array.shape}, got {stored} bytes"
    return None


def check_chunk(store: ChunkStore, key: str, array: ZarrArray) -> None:
    """Raises ValueError unless a chunk holds as many bytes as its array says, by what is written at its start.

    Of weights only the heads of blocks are read, one for each 128 KB.
    """
    data = store.read(key)
    if array.is_sharded:
        data = _in_shard(data)
    if not array.is_compressed:
        declared = bound = len(data)
    else:
        declared, bound = zstd_frame.declared_size(data) or 0, zstd_frame.largest_size(data)
    if declared != array.chunk_bytes or bound > _SHORTEST_BLOCKS * array.chunk_bytes + zstd_frame.MAX_BLOCK_BYTES:
        text = f"{declared} bytes" if declared != array.chunk_bytes else f"blocks that may hold {bound}"
        raise ValueError(f"expected {array.chunk_bytes} bytes for {array.dtype} {array.chunk}, got {text}")


def _in_shard(data: memoryview) -> memoryview:
    offset, length, _ = _INDEX.unpack_from(data, len(data) - _INDEX.size)
    if offset + length > len(data) - _INDEX.size:
        raise ValueError("its index says that it is missing, or past its end; it would be read as zeros")
    return data[offset : offset + length]
