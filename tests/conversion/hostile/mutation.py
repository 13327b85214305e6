"""Random damage: bits flipped, bytes overwritten, inserted, left out, cut off, copied; in JSON, other values."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from hypothesis import strategies as st

NUMBERS = [b"\0", b"\xff", b"\x7f", b"\x80", b"\1", bytes(4), b"\xff" * 4, b"\xff\xff\xff\x7f", bytes(8), b"\xff" * 8,
           b"\xff" * 7 + b"\x7f", b"\x7f" + b"\xff" * 7, b"\0\0\0\x80", b"\0\0\0\0\1\0\0\0"]  # fmt: skip
TEXTS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"-",
    b"9",
    b"e999",
    b"null",
    b"..",
    b"/",
    b"\n",
    b"\\u0000",
    b"\xc3",
    b"PK",
]


class Edit(NamedTuple):
    kind: str
    region: str
    place: int
    source: int
    length: int
    data: bytes

    def apply(self, file: bytearray) -> None:
        place, source = self._in(file, self.place), self._in(file, self.source)
        _KINDS[self.kind](file, place, source, self)

    def _in(self, file: bytearray, number: int) -> int:
        """A place in the file: in its first or last 600 bytes, or anywhere."""
        near = min(600, len(file))
        if self.region == "anywhere":
            return number % (len(file) + 1)
        return number % (near + 1) + (len(file) - near if self.region == "end" else 0)


def _flip(file: bytearray, place: int, source: int, edit: Edit) -> None:
    if place < len(file):
        file[place] ^= 1 << edit.length % 8


def _put(file: bytearray, place: int, source: int, edit: Edit) -> None:
    file[place : place + len(edit.data)] = edit.data


def _insert(file: bytearray, place: int, source: int, edit: Edit) -> None:
    file[place:place] = edit.data


def _delete(file: bytearray, place: int, source: int, edit: Edit) -> None:
    del file[place : place + edit.length]


def _cut(file: bytearray, place: int, source: int, edit: Edit) -> None:
    del file[place:]


def _zero(file: bytearray, place: int, source: int, edit: Edit) -> None:
    length = min(edit.length, len(file) - place)
    file[place : place + length] = bytes(length)


def _copy(file: bytearray, place: int, source: int, edit: Edit) -> None:
    block = file[source : source + edit.length]
    file[place : place + len(block)] = block


def _repeat(file: bytearray, place: int, source: int, edit: Edit) -> None:
    file[place:place] = file[source : source + edit.length]


_KINDS: dict[str, Callable[[bytearray, int, int, Edit], None]] = dict(
    flip=_flip, put=_put, insert=_insert, delete=_delete, cut=_cut, zero=_zero, copy=_copy, repeat=_repeat
)

_places = st.integers(0, 1 << 20)
edits = st.lists(
    st.builds(
        Edit,
        kind=st.sampled_from(["flip", "put", "flip", "put", *_KINDS]),
        region=st.sampled_from(["anywhere", "start", "end"]),
        place=_places,
        source=_places,
        length=st.integers(0, 16) | st.integers(0, 1000),
        data=st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.binary(max_size=12),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, changes: list[Edit]) -> bytes:
    file = bytearray(data)
    for edit in changes:
        edit.apply(file)
    return bytes(file)


# -- JSON -------------------------------------------------------------------------------------------------------------

_LEAVES = [None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, 10**30, 1.5, "", "a", "x" * 300, "..", "/etc/passwd",
           "float16", "\ud800", [], {}, [[]], [1], ["a"], {"a": 1}, [None], [2**40, 2**40], [-1], [0]]  # fmt: skip
json_edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.sampled_from(_LEAVES)), min_size=1, max_size=3)


def other_json(data: bytes, changes: list[tuple[int, object]]) -> bytes:
    """JSON with other values in some places, of objects, lists or leaves."""
    value = json.loads(data)
    for place, new in changes:
        holders = list(_places(value))
        if holders:
            holder, key = holders[place % len(holders)]
            holder[key] = copy.deepcopy(new)
    return json.dumps(value).encode()


def _places(value) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)
