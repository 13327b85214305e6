"""Damaged Orbax folders: trees and arrays that disagree, databases and chunks that lie, checkpoints left unfinished."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hostile.bases import TENSORS
from hostile.case import Case, cases

TREE, STATE, ARRAY = "_METADATA", "_CHECKPOINT_METADATA", ".zarray"
NAME = "model.decoder.layers.1.fc1.weight"
WEIGHT = "decoder.layers.1.fc1.weight"
IN_FOLDERS = "orbax in folders"
LONGEST_BLOCK = 1 << 17  # of Zstandard


def in_json(path: str, change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / "orbax" / path).read_text())
        change(fields)
        (folder / "orbax" / path).write_text(json.dumps(fields))

    return damage


def written(path: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "orbax" / path).write_bytes(data)


def removed(path: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "orbax" / path).unlink()


def in_leaf(**fields) -> Callable[[Path], None]:
    """Changes what the tree says of one leaf."""

    def change(tree: dict) -> None:
        leaf = next(leaf for text, leaf in tree["tree_metadata"].items() if "'1', 'fc1', 'weight'" in text)
        leaf["value_metadata"].update(fields)

    return in_json(TREE, change)


def more_leaf(*keys: str, text: str | None = None) -> Callable[[Path], None]:
    leaf = {
        "key_metadata": [{"key": key, "key_type": 2} for key in keys],
        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
    }
    return in_json(TREE, lambda tree: tree["tree_metadata"].update({text or str(keys): leaf}))


def in_array(**fields) -> Callable[[Path], None]:
    """Changes the metadata of one array; None leaves a field out."""
    given = {name: value for name, value in fields.items() if value is not ...}

    def change(array: dict) -> None:
        array.update(given)
        for name in fields.keys() - given.keys():
            del array[name]

    return in_json(f"{NAME}/{ARRAY}", change)


def chunk(data: bytes) -> Callable[[Path], Any]:
    return written(f"{NAME}/0.0", data)


def values_file(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Changes the file of the database that has the weights."""

    def damage(folder: Path) -> None:
        held = TENSORS[WEIGHT].tobytes()
        change(next(path for path in (folder / "orbax" / "d").iterdir() if held in path.read_bytes()))

    return damage


def tree_file(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Changes the file of the database that has the root of its tree of keys."""

    def damage(folder: Path) -> None:
        import tensorstore

        base = tensorstore.KvStore.open({"driver": "file", "path": f"{folder / 'orbax'}/"}).result()
        root = tensorstore.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]
        change(folder / "orbax" / "".join(root.split(":")[1:3]))

    return damage


def zstd_of(size: int, declared: int | None = None) -> bytes:
    """A frame of zeros in blocks that repeat one byte."""
    blocks = []
    for start in range(0, size, LONGEST_BLOCK):
        length = min(LONGEST_BLOCK, size - start)
        is_last = start + length == size
        blocks.append((is_last | 1 << 1 | length << 3).to_bytes(3, "little") + b"\0")
    head = b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", size if declared is None else declared)
    return head + b"".join(blocks)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(3).bytes(path.stat().st_size))


def linked_outside(path: Path) -> None:
    target = path.parents[3] / "outside"
    path.rename(target)
    path.symlink_to(target)


def without_metadata(folder: Path) -> None:
    removed(TREE)(folder)
    removed(STATE)(folder)


DEEP = b'{"a":' * 100_000
TREES = [
    ("no tree", removed(TREE), TREE, "expected"),
    ("neither tree nor state", without_metadata, "no weights", "an Orbax or"),
    ("a tree that is no JSON", written(TREE, b"{"), TREE, "not valid JSON"),
    ("a tree that is a list", written(TREE, b"[]"), TREE, "expected a JSON object"),
    ("a tree in itself", written(TREE, DEEP), TREE, "not valid JSON"),
    ("a tree over 10 MB", written(TREE, b" " * (10 * 2**20 + 1)), TREE, "expected at most"),
    ("a tree without leaves", in_json(TREE, lambda tree: tree.update(tree_metadata={})), TREE, "the leaves of a tree"),
    ("leaves in a list", in_json(TREE, lambda tree: tree.update(tree_metadata=[1])), TREE, "the leaves of a tree"),
    ("a leaf of nothing", in_json(TREE, lambda tree: tree["tree_metadata"].update(a={})), "a", "expected key_metadata"),
    ("a leaf that is not stored", more_leaf("model", "more"), "model.more", ".zarray is missing"),
    ("a leaf that leaves the folder", more_leaf("..", "..", "etc"), "..", "expected keys without separators"),
    ("a leaf from the root", more_leaf("/etc/passwd"), "/etc/passwd", "expected keys without separators"),
    ("a leaf with a zero byte", more_leaf("a\0b"), "a", "expected keys without separators"),
    ("a leaf under another text", more_leaf("a", "b", text="('c',)"), "('c',)", "the same twice"),
    ("a leaf twice", more_leaf("model", "decoder.layers", "1.fc1.weight"), NAME, "2 leaves of this name"),
    ("a leaf of another shape", in_leaf(write_shape=[31, 23]), NAME, r"says \(31, 23\), the array \(31, 22\)"),
    ("a leaf of a negative shape", in_leaf(write_shape=[-1, 22]), "fc1", "expected a type and a shape"),
    ("a leaf of a number for a type", in_leaf(value_type=7), "fc1", "expected a type and a shape"),
    ("a leaf that is no array", in_leaf(value_type="scalar"), WEIGHT, "missing, expected"),
    (
        "a tree of the other form",
        in_json(TREE, lambda tree: tree.update(use_ocdbt=False)),
        TREE,
        "expected a folder without",
    ),
    (
        "a tree of a form that is a number",
        in_json(TREE, lambda tree: tree.update(use_ocdbt=7)),
        "use_ocdbt",
        "a truth value",
    ),
    ("a tree of Zarr 3", in_json(TREE, lambda tree: tree.update(use_zarr3=True)), NAME, "zarr.json is missing"),
    (
        "saving that never ended",
        in_json(STATE, lambda state: state.update(commit_timestamp_nsecs=None)),
        STATE,
        "unfinished",
    ),
    ("a state that is no JSON", written(STATE, b"{"), STATE, "not valid JSON"),
    (
        "a folder that Orbax calls temporary",
        lambda folder: (folder / "orbax").rename(folder / "orbax.orbax-checkpoint-tmp-7"),
        "_METADATA",
        "expected .*got neither",
    ),
]
DATABASE = [
    ("no manifest", removed("manifest.ocdbt"), TREE, "expected a folder with manifest.ocdbt"),
    ("an empty manifest", written("manifest.ocdbt", b""), "manifest.ocdbt", "expected"),
    (
        "a manifest of noise",
        written("manifest.ocdbt", np.random.default_rng(3).bytes(300)),
        "manifest.ocdbt",
        "expected",
    ),
    ("a manifest of 2 MB", written("manifest.ocdbt", bytes(2**21)), "manifest.ocdbt", "at most 1048576 bytes"),
    ("a manifest that is cut", lambda folder: cut(folder / "orbax" / "manifest.ocdbt"), "ocdbt", "expected|damaged"),
    ("no data", values_file(Path.unlink), "d/", "missing, expected .* bytes of it"),
    ("data that is cut", values_file(cut), "d/", "truncated, expected"),
    ("no tree of keys", tree_file(Path.unlink), "d/", "missing, expected .* bytes of it"),
    ("a tree of keys that is cut", tree_file(cut), "d/", "truncated, expected"),
    ("a tree of keys of noise", tree_file(noise), "d/", "expected a node at byte"),
    ("data behind a link that leaves the folder", values_file(linked_outside), "d/", "a link that leaves the folder"),
    ("data in a pipe", values_file(lambda path: (path.unlink(), os.mkfifo(path))), "d/", "a pipe or a device"),
]
ARRAYS = [
    ("no metadata", removed(f"{NAME}/{ARRAY}"), NAME, ".zarray is missing"),
    ("metadata that is no JSON", written(f"{NAME}/{ARRAY}", b"{"), NAME, "not valid JSON"),
    ("metadata that is a list", written(f"{NAME}/{ARRAY}", b"[]"), NAME, "expected a JSON object"),
    ("metadata in itself", written(f"{NAME}/{ARRAY}", DEEP[:60_000]), NAME, "not valid JSON"),
    ("metadata of 70 KB", written(f"{NAME}/{ARRAY}", b" " * 70_000), NAME, "at most 65536 bytes of metadata"),
    ("a field twice", written(f"{NAME}/{ARRAY}", b'{"shape":[1],"shape":[2]}'), NAME, "duplicate key 'shape'"),
    ("a field less", in_array(order=...), NAME, "expected"),
    ("a field more", in_array(rotation=7), NAME, "rotation"),
    ("Zarr of tomorrow", in_array(zarr_format=9), NAME, "zarr_format: expected 2, got 9"),
    ("columns first", in_array(order="F"), NAME, "order: expected C, got F"),
    ("a filter", in_array(filters=[{"id": "delta"}]), NAME, "filters: expected None"),
    ("a compressor that is not read", in_array(compressor={"id": "blosc"}), NAME, "compressor: expected zstd or none"),
    ("a compressor that is a text", in_array(compressor="zstd"), NAME, "compressor: expected zstd or none"),
    ("a separator of others", in_array(dimension_separator="\\"), NAME, "dimension_separator: expected"),
    ("integers", in_array(dtype="<i4"), NAME, "expected a dtype of .*, got <i4"),
    ("big-endian numbers", in_array(dtype=">f4"), NAME, "expected a dtype of .*, got >f4"),
    ("objects", in_array(dtype="|O"), NAME, "expected a dtype of .*, got [|]O"),
    ("half the width", in_array(dtype="<f2"), NAME, "expected|damaged"),
    ("another shape", in_array(shape=[22, 31], chunks=[22, 31]), WEIGHT, "says|expected"),
    ("a negative shape", in_array(shape=[-31, 22]), NAME, "axes of positive length"),
    ("a shape with a fraction", in_array(shape=[31.0, 22]), NAME, "axes of positive length"),
    ("nine axes", in_array(shape=[1] * 9, chunks=[1] * 9), NAME, "at most 8 axes"),
    ("a terabyte", in_array(shape=[2**19, 2**19], chunks=[2**19, 2**19]), NAME, "says|expected"),
    (
        "a terabyte in chunks of one",
        in_array(shape=[2**19, 2**19], chunks=[1, 1]),
        NAME,
        "says|expected|missing, one of 274877906944 chunks",
    ),
    ("chunks of nothing", in_array(chunks=[0, 22]), NAME, "axes of positive length"),
    ("chunks larger than the array", in_array(chunks=[310, 220]), NAME, "chunks no larger than"),
    ("fewer sizes of chunks", in_array(chunks=[31]), NAME, "axes of positive length"),
    ("chunks that are not there", in_array(chunks=[1, 22]), NAME, "expected|missing"),
    ("a chunk that is missing", removed(f"{NAME}/0.0"), NAME, "expected|missing"),
    ("an empty chunk", chunk(b""), NAME, "expected|damaged"),
    ("a chunk of noise", chunk(np.random.default_rng(3).bytes(2000)), NAME, "expected a Zstandard frame|damaged"),
    ("a chunk that unpacks to less", chunk(zstd_of(1000)), NAME, "expected|damaged"),
    ("a chunk that unpacks to more", chunk(zstd_of(3000)), NAME, "expected|damaged"),
    ("a chunk that unpacks to 2 GB", chunk(zstd_of(2**31)), NAME, "expected|damaged"),
    ("a chunk that says it unpacks to 2^60 bytes", chunk(zstd_of(1000, declared=2**60)), NAME, "expected|damaged"),
    ("bytes after a chunk", chunk(zstd_of(2728) + b"more"), NAME, "expected one Zstandard frame|damaged"),
    (
        "a chunk behind a link that leaves the folder",
        lambda folder: linked_outside(folder / "orbax" / NAME / "0.0"),
        "0.0",
        "a link that leaves the folder",
    ),
    (
        "a folder for a chunk",
        lambda f: (removed(f"{NAME}/0.0")(f), (f / "orbax" / NAME / "0.0").mkdir()),
        NAME,
        "expected|missing",
    ),
    (
        "a pipe for a chunk",
        lambda f: (removed(f"{NAME}/0.0")(f), os.mkfifo(f / "orbax" / NAME / "0.0")),
        "0.0",
        "a pipe",
    ),
]
CASES: list[Case] = [
    *cases("orbax", 11, [*TREES, *DATABASE]),
    *cases(IN_FOLDERS, 11, ARRAYS),
]
