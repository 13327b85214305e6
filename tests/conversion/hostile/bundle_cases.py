"""Damaged TensorFlow checkpoints and variables of SavedModels: entries that lie, tables and graphs that are none."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

from conversion.crc32c import extend, masked
from conversion.tf_checkpoint.bundle_entry import entry_bytes, read_entry
from conversion.tf_checkpoint.protobuf_wire import message
from conversion.tf_checkpoint.sstable import read_table, table_bytes
from conversion.tf_checkpoint.trackable_graph import GRAPH_KEY, graph_bytes, key_of
from hostile.bases import TENSORS
from hostile.case import Case, cases

INDEX, DATA = "ckpt-1.index", "ckpt-1.data-00000-of-00001"
NAME = "model/model/decoder/layers/1/fc1/weight"
KEY = key_of(NAME).encode()
WEIGHT = "decoder.layers.1.fc1.weight"
NBYTES = TENSORS[WEIGHT].nbytes


def index_of(folder: Path) -> Path:
    return next(folder.rglob("*.index"))


def table(change: Callable[[dict[bytes, bytes]], object]) -> Callable[[Path], None]:
    """Changes the entries of the index, whose checksums are right."""

    def damage(folder: Path) -> None:
        entries = read_table(index_of(folder))
        change(entries)
        index_of(folder).write_bytes(table_bytes(entries))

    return damage


def entry(dtype="float32", shape=(31, 22), start: int | None = None, nbytes=NBYTES, more=b"") -> Callable[[Path], None]:
    """Another entry for one weight, in its place unless `start` says another."""

    def change(entries: dict[bytes, bytes]) -> None:
        place = read_entry(entries[KEY]).offset if start is None else start
        entries[KEY] = entry_bytes(dtype, shape, place, nbytes, 0) + more

    return table(change)


def header(*fields: tuple[int, int | bytes]) -> Callable[[Path], None]:
    return table(lambda entries: entries.update({b"": message(fields)}))


def graph(data: bytes) -> Callable[[Path], None]:
    """Another object graph at the end of the data, with its checksums."""

    def damage(folder: Path) -> None:
        length = struct.pack("<I", len(data))
        stored = message([])  # nothing
        size = len(data)
        while size >= 0x80:
            stored += bytes([size & 0x7F | 0x80])
            size >>= 7
        head = struct.pack("<I", masked(extend(0, length)))
        stored += bytes([size]) + head + data
        path = next(folder.rglob("*.data-*"))
        start = path.stat().st_size
        with open(path, "ab") as file:
            file.write(stored)
        checksum = extend(0, length + head + data)
        new = entry_bytes("string", (), start, len(stored), checksum)
        table(lambda entries: entries.update({GRAPH_KEY.encode(): new}))(folder)

    return damage


def patched(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    """Changes the bytes of the index."""

    def damage(folder: Path) -> None:
        data = bytearray(index_of(folder).read_bytes())
        change(data)
        index_of(folder).write_bytes(data)

    return damage


def blocks(*entries: tuple[bytes, bytes], compression: int = 0) -> Callable[[Path], None]:
    """A table of one block, whose entries are in no order."""

    def damage(folder: Path) -> None:
        data = bytearray(table_bytes(dict(entries)))
        if len(entries) == 2:  # `table_bytes` sorts
            ordered = sorted(entries)
            first, second = (b"\0" + bytes([len(key), len(value)]) + key + value for key, value in ordered)
            place = data.index(first + second)
            data[place : place + len(first + second)] = second + first
        size = data.index(struct.pack("<I", len(entries)), sum(len(k) + len(v) + 3 for k, v in entries)) + 4
        data[size] = compression
        data[size + 1 : size + 5] = struct.pack("<I", masked(extend(0, bytes(data[: size + 1]))))
        index_of(folder).write_bytes(data)

    return damage


def flipped(folder: Path) -> None:
    """One bit of one weight."""
    path = next(folder.rglob("*.data-*"))
    data = bytearray(path.read_bytes())
    data[data.index(TENSORS[WEIGHT].tobytes()) + 100] ^= 4
    path.write_bytes(data)


def second_index(folder: Path) -> None:
    """Two checkpoints, and nothing that says which is the latest."""
    (folder / "checkpoint").unlink()
    for path in list(folder.glob("ckpt-1.*")):
        (folder / path.name.replace("ckpt-1", "ckpt-2")).write_bytes(path.read_bytes())


def deep_graph(depth: int) -> bytes:
    return graph_bytes(["/".join(["a"] * depth)])


NODE = message([(1, message([(1, 7), (2, b"a")]))])
CYCLE = message([(1, message([(1, message([(1, 0), (2, b"a")]))]))])
OPENED = struct.pack("<Q", 2**63 - 1)
ENTRIES = [
    ("no entry of a weight", table(lambda entries: entries.pop(KEY)), NAME, "in the object graph, but not stored"),
    ("an entry that is no message", table(lambda entries: entries.update({KEY: b"\xff\xff"})), NAME, "expected"),
    ("an entry of a group", table(lambda entries: entries.update({KEY: b"\x0b"})), NAME, "a damaged one"),
    ("an empty entry", table(lambda entries: entries.update({KEY: b""})), WEIGHT, "missing, expected"),
    ("integers", entry("int32"), NAME, "expected a dtype of .*, got int32"),
    ("complex numbers", entry("complex64", nbytes=2 * NBYTES), "model/model", "an overlap"),
    ("text for numbers", entry("string"), NAME, "expected numbers, got a dtype of string"),
    ("a dtype of number 99", entry(more=message([(1, 99)])), NAME, "a dtype of number 99 of TensorFlow"),
    ("quantised numbers", entry(more=message([(1, 11)])), NAME, "a dtype of number 11 of TensorFlow"),
    ("more elements than bytes", entry(shape=(31, 23)), NAME, "expected 2852 bytes for float32"),
    ("fewer elements than bytes", entry(shape=(31, 21)), NAME, "expected 2604 bytes for float32"),
    ("2^80 elements", entry(shape=(2**40, 2**40)), NAME, "expected 4835703278458516698824704 bytes"),
    ("a terabyte", entry(shape=(2**20, 2**18), nbytes=2**40), NAME, "truncated, or a wrong place"),
    ("a negative size", entry(shape=(2**64 - 31, 2**64 - 22)), NAME, "at most 8 sizes"),
    ("nine axes", entry(shape=(1,) * 9), NAME, "at most 8 sizes"),
    ("a size of zero", entry(shape=(0, 2**62), nbytes=0), NAME, "expected positive sizes"),
    ("no axes", entry(shape=(), nbytes=4), WEIGHT, "missing, expected"),
    ("a rank that is not known", entry(shape=(), more=message([(2, message([(3, 1)]))])), NAME, "unknown rank"),
    ("a place behind the file", entry(start=2**40), NAME, "truncated, or a wrong place: bytes 1099511627776"),
    ("a negative place", entry(start=2**64 - 1), NAME, "truncated, or a wrong place"),
    ("a place on another weight", entry(start=0), "model/model/decoder/embed", "an overlap"),
    ("a data file of number 7", entry(more=message([(3, 7)])), NAME, "expected one of 1 data files, got number 7"),
    ("a slice of a tensor", entry(more=message([(7, b"")])), NAME, "expected a whole tensor, got one in slices"),
    ("a weight that was turned", entry(shape=(22, 31)), WEIGHT, r"expected \(31, 22\), got \(22, 31\)"),
]
TABLES = [
    ("no header", table(lambda entries: entries.pop(b"")), INDEX, "a table without its header"),
    ("a header that is no message", table(lambda e: e.update({b"": b"\xff"})), "header", "expected a number"),
    ("no data files", header((1, 0)), "header", "expected 1 to 9999 data files"),
    ("a billion data files", header((1, 10**9)), "header", "expected 1 to 9999 data files"),
    ("9999 data files that are not there", header((1, 9999)), "ckpt-1.data-00000-of-09999", "missing"),
    ("two data files", header((1, 2)), "ckpt-1.data-00000-of-00002", "missing, expected beside the index"),
    ("big-endian numbers", header((1, 1), (2, 1)), "header", "little-endian"),
    ("for readers of tomorrow", header((1, 1), (3, message([(1, 9), (2, 9)]))), "header", "version 9"),
    ("no data", lambda folder: (folder / DATA).unlink(), DATA, "missing, expected beside the index"),
    ("an empty index", patched(bytearray.clear), "no weights", "TensorFlow checkpoint"),
    (
        "an index that is cut",
        patched(lambda data: data.__delitem__(slice(100, None))),
        "no weights",
        "TensorFlow checkpoint",
    ),
    (
        "a flipped bit in the index",
        patched(lambda data: data.__setitem__(50, data[50] ^ 1)),
        "block at byte 0",
        "damaged",
    ),
    (
        "a footer that points behind the file",
        patched(lambda d: d.__setitem__(slice(-48, -30), b"\xff\xff\x7f" * 6)),
        "block at byte",
        "truncated",
    ),
    (
        "a footer without numbers",
        patched(lambda d: d.__setitem__(slice(-48, -8), b"\xff" * 40)),
        INDEX,
        "without an end",
    ),
    (
        "an index of 17 MB",
        patched(lambda data: data.__setitem__(slice(0, 0), bytes(17 * 2**20))),
        INDEX,
        "at most 16777216",
    ),
    ("two checkpoints", second_index, "ckpt-2.index", "holds several checkpoints"),
    ("keys in another order", blocks((b"a", b"1"), (b"b", b"2")), "block at byte 0", "ascending order"),
    ("a compressed block", blocks((b"a", b"1"), compression=1), "block at byte 0", "got a compressed one"),
    ("a key that leaves the model", table(lambda e: e.update({b"../../x": e.pop(KEY)})), NAME, "but not stored"),
    ("a key that is no UTF-8", table(lambda e: e.update({b"\xff\xfe": e[KEY]})), "xff", "codec"),
]
GRAPHS = [
    ("a graph of noise", graph(b"\xff" * 100), GRAPH_KEY, "expected"),
    ("a graph of nothing", graph(b""), GRAPH_KEY, "objects, got none"),
    ("a child that is not there", graph(message([(1, NODE)])), GRAPH_KEY, "expected one of 1 objects, got number 7"),
    ("an object in itself", graph(CYCLE), "decoder.embed_tokens.weight", "missing, expected"),
    ("2000 objects in one another", graph(deep_graph(2000)), GRAPH_KEY, "attribute paths of at most 1024"),
    ("300,000 objects", graph(b"\x0a\x00" * 300_000), GRAPH_KEY, "expected 1 to 65536 objects"),
    ("a graph of 5 MB", graph(bytes(5 * 2**20)), GRAPH_KEY, "expected at most 4194304 bytes"),
    (
        "a name that is no UTF-8",
        graph(message([(1, message([(1, message([(1, 0), (2, b"\xff")]))]))])),
        GRAPH_KEY,
        "UTF-8",
    ),
    ("a graph of other variables", graph(graph_bytes(["a/b"])), "a/b", "in the object graph, but not stored"),
    (
        "a graph whose checksum is wrong",
        table(lambda e: e.update({GRAPH_KEY.encode(): entry_bytes("string", (), 0, 0, 7)})),
        GRAPH_KEY,
        "expected",
    ),
]
CASES: list[Case] = [
    *cases("tf-checkpoint", 11, [*TABLES, *GRAPHS]),
    *cases("tf-checkpoint", 3, ENTRIES),
    *cases(
        "tf-checkpoint",
        11,
        [("a flipped bit", flipped, NAME, "expected checksum .*damaged")],
        opening=dict(verify=True),
    ),
    *cases(
        "saved-model",
        11,
        [
            ("no variables", lambda folder: index_of(folder).unlink(), "no weights", "looked for"),
            (
                "a folder for the variables",
                lambda f: (index_of(f).unlink(), (f / "variables" / "variables.index").mkdir()),
                "no weights",
                "looked for",
            ),
            (
                "a pipe for the variables",
                lambda f: (index_of(f).unlink(), os.mkfifo(f / "variables" / "variables.index")),
                "no weights",
                "looked for",
            ),
            (
                "variables without a program",
                lambda folder: (folder / "saved_model.pb").unlink(),
                "no weights",
                "looked for",
            ),
            (
                "no entry of a weight",
                table(lambda entries: entries.pop(KEY)),
                NAME,
                "in the object graph, but not stored",
            ),
            ("a place behind the file", entry(start=2**40), NAME, "truncated, or a wrong place"),
        ],
    ),
]
