"""LevelDB's table file, in which TensorFlow keeps the index of a checkpoint: sorted keys with short values, in blocks.

A table is read whole, since an index is small: that of OPT's largest takes 0.2 MB. Its blocks' checksums are always
compared. Compressed blocks, which TensorFlow does not write into an index, are refused. Sources: LevelDB's
doc/table_format.md; `tensorflow/core/lib/io/{format,block,table_builder}.cc` of TensorFlow 2.21.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from conversion import crc32c
from conversion.tf_checkpoint.protobuf_wire import Malformed, read_varint, varint
from opt_core.errors import CheckpointError

MAGIC = bytes.fromhex("57fb808b247547db")  # the last bytes of the file
MAX_TABLE_BYTES = 1 << 24
MAX_KEY_BYTES = 1024
_MAX_ENTRIES = 1 << 17
_FOOTER_BYTES = 48
_TRAILER = struct.Struct("<BI")  # behind each block: how it is compressed, and its masked checksum


def read_table(path: Path) -> dict[bytes, bytes]:
    """Keys and values in order.

    Raises:
        CheckpointError: names the block that is damaged.
    """
    size = path.stat().st_size
    if size > MAX_TABLE_BYTES:
        raise CheckpointError(str(path), [f"expected an index of at most {MAX_TABLE_BYTES} bytes, got {size}"])
    data = path.read_bytes()
    if len(data) < _FOOTER_BYTES or not data.endswith(MAGIC):
        text = f"expected an index as TensorFlow writes it, got another or truncated file of {len(data)} bytes"
        raise CheckpointError(str(path), [text])
    try:
        return _read_entries(data)
    except Malformed as error:
        raise CheckpointError(str(path), [str(error)]) from None


def _read_entries(data: bytes) -> dict[bytes, bytes]:
    entries: dict[bytes, bytes] = {}
    last, reached = None, 0
    for start, size in _data_blocks(data):
        if start < reached:
            raise Malformed(f"block at byte {start}: expected blocks that follow each other, got an overlap")
        reached = start + size
        for key, value in _block_entries(_block(data, start, size), start):
            if last is not None and key <= last:
                raise Malformed(f"block at byte {start}: expected keys in ascending order, got {key[:200]!r}")
            if len(entries) == _MAX_ENTRIES:
                raise Malformed(f"expected at most {_MAX_ENTRIES} entries, got more")
            entries[key] = value
            last = key
    return entries


def _data_blocks(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and size of each block of entries."""
    footer = data[-_FOOTER_BYTES:]
    _, behind_unused = _handle(footer, 0)
    (start, size), _ = _handle(footer, behind_unused)
    for _, value in _block_entries(_block(data, start, size), start):
        yield _handle(value, 0)[0]


def _handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    start, position = read_varint(data, position)
    size, position = read_varint(data, position)
    return (start, size), position


def _block(data: bytes, start: int, size: int) -> bytes:
    stop = start + size
    if stop + _TRAILER.size > len(data) - _FOOTER_BYTES:
        raise Malformed(f"block at byte {start}: truncated, ends at byte {stop} of {len(data)}")
    compression, stored = _TRAILER.unpack_from(data, stop)
    got = crc32c.masked(crc32c.extend(0, data[start : stop + 1]))
    if got != stored:
        raise Malformed(f"block at byte {start}: expected checksum {stored:08x}, got {got:08x}: the bytes are damaged")
    if compression:
        raise Malformed(f"block at byte {start}: expected one stored as it is, got a compressed one")
    return data[start:stop]


def _block_entries(block: bytes, start: int) -> Iterator[tuple[bytes, bytes]]:
    """Each key is stored as how much it shares with the one before, and the rest."""
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")
    if len(block) < 4 or end < 0:
        raise Malformed(f"block at byte {start}: expected a list of restarts at its end, got a damaged one")
    key, position = b"", 0
    while position < end:
        shared, position = read_varint(block, position)
        rest, position = read_varint(block, position)
        length, position = read_varint(block, position)
        if shared > len(key) or rest + length > end - position or shared + rest > MAX_KEY_BYTES:
            raise Malformed(f"block at byte {start}: expected a key and a value, got a damaged entry")
        key = key[:shared] + block[position : position + rest]
        position += rest + length
        yield key, block[position - length : position]


# -- writing ----------------------------------------------------------------------------------------------------------


def table_bytes(entries: Mapping[bytes, bytes]) -> bytes:
    """A table of one block, its keys whole."""
    ordered = sorted(entries.items())
    table = bytearray()
    data_block = _append_block(table, ordered)
    unused_block = _append_block(table, [])
    index_block = _append_block(table, [(ordered[-1][0], data_block)])
    footer = (unused_block + index_block).ljust(_FOOTER_BYTES - len(MAGIC), b"\0")
    return bytes(table) + footer + MAGIC


def _append_block(table: bytearray, entries: list[tuple[bytes, bytes]]) -> bytes:
    """Appends a block in which each entry is a restart, and returns where it lies."""
    block, restarts = bytearray(), []
    for key, value in entries:
        restarts.append(len(block))
        block += varint(0) + varint(len(key)) + varint(len(value)) + key + value
    restarts = restarts or [0]
    block += struct.pack(f"<{len(restarts)}II", *restarts, len(restarts))
    handle = varint(len(table)) + varint(len(block))
    checksum = crc32c.masked(crc32c.extend(0, bytes(block) + b"\0"))
    table += block + _TRAILER.pack(0, checksum)
    return handle
