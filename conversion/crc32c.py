"""CRC-32C, and the masked form in which LevelDB and TensorFlow store it.

The google-crc32c package computes it where it is installed. The table below does as well, at some MB/s: enough for
what describes a checkpoint, not for its weights. Sources: RFC 3720, appendix B.4; `tsl/lib/hash/crc32c.h` of
TensorFlow 2.21.
"""

from functools import lru_cache

import numpy as np

from opt_core.errors import InputError

_POLYNOMIAL = 0x82F63B78  # of Castagnoli, bits reversed
_MASK = 0xA282EAD8


def extend(crc: int, data: bytes | np.ndarray) -> int:
    """The CRC-32C of something whose CRC is `crc`, followed by `data`, bytes or [n] of uint8; 0 is that of nothing."""
    try:
        import google_crc32c
    except ImportError:
        return _extend_by_table(crc, data)
    return google_crc32c.extend(crc, data)


def masked(crc: int) -> int:
    """What is stored: rotated and shifted, since the CRC of what holds a CRC is a weak one."""
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def check_is_fast() -> None:
    """Raises an InputError that says what to install, unless the CRC of whole weights is practical."""
    try:
        from google_crc32c import implementation
    except ImportError:
        implementation = "no package"
    if implementation != "c":
        text = f"expected its implementation in C, got {implementation}: pip install google-crc32c"
        raise InputError("checksums of TensorFlow", [f"google-crc32c: {text}"])


def _extend_by_table(crc: int, data: bytes | np.ndarray) -> int:
    table, crc = _table(), crc ^ 0xFFFFFFFF
    for byte in bytes(data):
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


@lru_cache
def _table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ _POLYNOMIAL * (crc & 1) for crc in table]
    return table
