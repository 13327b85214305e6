"""The wire format of protocol buffers, as far as the files of TensorFlow need it: numbered fields, without a schema.

What the fields mean is the business of who reads them. Groups, which nobody writes any more, are refused.
Source: protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterable, Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10


class Malformed(ValueError):
    """Bytes that are not what they should be; the text says where."""


class Fixed32(int):
    """A number that is written in four bytes."""


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in their order: number and value, of which bytes may be text or a message again."""
    position = 0
    while position < len(data):
        tag, position = read_varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, position = read_varint(data, position)
            yield number, value
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(kind)
        if kind == _BYTES:
            length, position = read_varint(data, position)
        if number == 0 or length is None or length > len(data) - position:
            raise Malformed(f"expected a field of a message at byte {position}, got a damaged one")
        run = data[position : position + length]
        yield number, run if kind == _BYTES else int.from_bytes(run, "little")
        position += length


def values(data: bytes) -> dict[int, int | bytes]:
    """The last value of each field, which is the one that counts where a field is not repeated."""
    return dict(fields(data))


def number_of(message: dict[int, int | bytes], field: int) -> int:
    """The value of a numeric field, 0 where it is left out; negative ones are stored in 64 bits."""
    value = message.get(field, 0)
    if not isinstance(value, int):
        raise Malformed(f"field {field}: expected a number, got {len(value)} bytes")
    return value - (1 << 64) if value >> 63 else value


def bytes_of(value: int | bytes) -> bytes:
    """The value of a field that holds text or a message."""
    if isinstance(value, int):
        raise Malformed(f"expected text or a message, got the number {value}")
    return value


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of up to 64 bits, seven to a byte, the lowest first; and the position behind it."""
    value = 0
    for index, byte in enumerate(data[position : position + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value & (1 << 64) - 1, position + index + 1
    raise Malformed(f"expected a number at byte {position}, got one without an end")


# -- writing ----------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    """The inverse of `read_varint`."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def message(content: Iterable[tuple[int, int | bytes]]) -> bytes:
    """A message of fields, each a number and a value that is not negative."""
    return b"".join(_field(number, value) for number, value in content)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, Fixed32):
        return varint(number << 3 | _FIXED32) + value.to_bytes(4, "little")
    if isinstance(value, int):
        return varint(number << 3 | _VARINT) + varint(value)
    return varint(number << 3 | _BYTES) + varint(len(value)) + value
