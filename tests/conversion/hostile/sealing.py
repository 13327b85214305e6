"""Damage behind checksums: bytes are changed, and what is computed from them is made right again."""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from conversion.crc32c import extend, masked
from conversion.orbax import ocdbt
from conversion.tf_checkpoint import sstable
from conversion.tf_checkpoint.bundle_entry import read_entry, read_text
from conversion.tf_checkpoint.protobuf_wire import varint
from conversion.tf_checkpoint.trackable_graph import GRAPH_KEY
from hostile.bases import weight_files
from hostile.bundle_cases import graph, index_of

Change = Callable[[bytes], bytes]


def pickle_in_zip(folder: Path, change: Change) -> None:
    """Changes the pickle in every file of torch."""
    for path in weight_files(folder):
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def block_of_table(folder: Path, change: Change) -> None:
    """Changes the entries in the index of a TensorFlow checkpoint, as bytes."""
    path = index_of(folder)
    data = path.read_bytes()
    ((start, size),) = sstable._data_blocks(data)
    block = change(data[start : start + size])
    handle = varint(0) + varint(len(block))
    index = varint(0) + varint(1) + varint(len(handle)) + b"\xff" + handle + struct.pack("<II", 0, 1)
    table = b"".join(one + b"\0" + struct.pack("<I", masked(extend(0, one + b"\0"))) for one in (block, index))
    footer = handle + varint(len(block) + 5) + varint(len(index))
    path.write_bytes(table + footer.ljust(40, b"\0") + sstable.MAGIC)


def object_graph(folder: Path, change: Change) -> None:
    """Changes the object graph of a TensorFlow checkpoint."""
    entry = read_entry(sstable.read_table(index_of(folder))[GRAPH_KEY.encode()])
    data = next(folder.rglob("*.data-*")).read_bytes()
    graph(change(read_text(data[entry.offset : entry.offset + entry.nbytes], entry.checksum)))(folder)


def manifest(folder: Path, change: Change) -> None:
    """Changes the manifest of an OCDBT database, which is unpacked for it."""
    path = folder / "orbax" / ocdbt.MANIFEST
    data = path.read_bytes()
    content = data[14:-4]
    changed = change(ocdbt._unpack(content, 1 << 20) if data[13] else content)
    head = data[:4] + struct.pack("<Q", 18 + len(changed)) + data[12:13] + b"\0"
    path.write_bytes(head + changed + struct.pack("<I", extend(0, head + changed)))


SEALED: dict[str, tuple[str, Callable[[Path, Change], None]]] = {
    "the pickle of torch": ("torch-bin", pickle_in_zip),
    "the pickle of metaseq's training": ("metaseq raw", pickle_in_zip),
    "the pickle of metaseq's parts": ("metaseq unflattened", pickle_in_zip),
    "the pickle with omegaconf": ("metaseq-singleton restored", pickle_in_zip),
    "the index of TensorFlow": ("tf-checkpoint", block_of_table),
    "the object graph of TensorFlow": ("tf-checkpoint", object_graph),
    "the manifest of Orbax": ("orbax", manifest),
}
