"""How much a Zstandard frame can unpack to, by the heads of its blocks; unpacks nothing.

A frame of 100 KB may hold 3 GB. Its own word for its size is checked by decoders only after they have unpacked it.
Source: RFC 8878.
"""

import struct

MAX_BLOCK_BYTES = 1 << 17
_MAGIC = b"\x28\xb5\x2f\xfd"
_RAW, _REPEATED, _COMPRESSED = range(3)


def largest_size(frame: memoryview) -> int:
    """Bytes that one frame unpacks to at most: exact but for compressed blocks, which count as full ones.

    Raises:
        ValueError: this is not one whole frame.
    """
    _, position = _head(frame)
    total, is_last = 0, False
    while not is_last:
        head = int.from_bytes(frame[position : position + 3], "little")
        is_last, kind, size = bool(head & 1), head >> 1 & 3, head >> 3
        position += 3 + (1 if kind == _REPEATED else size)
        if position > len(frame) or kind > _COMPRESSED:
            raise ValueError("a damaged or truncated Zstandard frame")
        total += MAX_BLOCK_BYTES if kind == _COMPRESSED else size
    checksum = 4 * (frame[4] >> 2 & 1)
    if position + checksum != len(frame):
        raise ValueError(f"expected one Zstandard frame of {position + checksum} bytes, got {len(frame)}")
    return total


def declared_size(frame: memoryview) -> int | None:
    """Bytes that the frame says it unpacks to, where it says it.

    Raises:
        ValueError: this is no Zstandard frame.
    """
    return _head(frame)[0]


def _head(frame: memoryview) -> tuple[int | None, int]:
    """The declared size, and where the first block starts."""
    if len(frame) < 9 or bytes(frame[:4]) != _MAGIC:
        raise ValueError(f"expected a Zstandard frame, got {bytes(frame[:4]).hex()}")
    descriptor = frame[4]
    is_single = bool(descriptor >> 5 & 1)
    size_bytes = (int(is_single), 2, 4, 8)[descriptor >> 6]
    start = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]  # after the window and the id of a dictionary
    stop = start + size_bytes
    if stop > len(frame):
        raise ValueError("a truncated Zstandard frame")
    if not size_bytes:
        return None, stop
    size = struct.unpack_from("<" + {1: "B", 2: "H", 4: "I", 8: "Q"}[size_bytes], frame, start)[0]
    return size + (256 if size_bytes == 2 else 0), stop
