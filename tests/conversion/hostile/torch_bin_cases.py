"""Damaged torch `.bin`: pickles that call, tensors that are bombs, and zips that disagree with themselves."""

import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hostile.bases import TENSORS, weight_file
from hostile.case import Case, cases

FILE = "pytorch_model.bin"
BIAS = "decoder.layers.0.fc1.bias"


def quantised(path: Path) -> dict:
    return {BIAS: torch.quantize_per_tensor(torch.zeros(31), 0.1, 0, torch.qint8)}


class Payload:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(state: Callable[[Path], Any] | Any, **options) -> Callable[[Path], None]:
    """What torch.save makes of a state, or of what a function of the file's path returns."""

    def damage(folder: Path) -> None:
        path = weight_file(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(state(path) if callable(state) else state, path, **options)

    return damage


def calling(make: Callable[[Path], Payload], **options) -> Callable[[Path], None]:
    """A state dict with a weight that calls a function; of the canary that would show it, beside the source."""
    return saved(lambda path: {"decoder.embed_tokens.weight": make(path.parent.parent / "executed")}, **options)


def rebuilt(change: Callable[[str, bytes], list[tuple[str, bytes]]], **options) -> Callable[[Path], None]:
    """Copies the members of the zip through `change(name, data)`, which returns members."""

    def damage(folder: Path) -> None:
        path = weight_file(folder)
        with zipfile.ZipFile(path) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", **options) as archive:
            warnings.simplefilter("ignore")  # of names that occur twice
            for name, data in members:
                for new_name, new_data in change(name, data):
                    archive.writestr(new_name, new_data)

    return damage


def member(end: str, data: bytes | None) -> Callable[[Path], None]:
    """Replaces the member whose name ends in `end`; None leaves it out."""

    def change(name: str, old: bytes) -> list[tuple[str, bytes]]:
        if not name.endswith(end):
            return [(name, old)]
        return [] if data is None else [(name, data)]

    return rebuilt(change)


def state_pickle(size="(J\x1f\x00\x00\x00t", offset="K\x00", stride="(K\x01t", count=31, key="0") -> bytes:
    """`data.pkl` of one bias, with parts to break."""
    storage = (
        "(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        f"X{struct.pack('<I', len(key)).decode('latin-1')}{key}X\x03\x00\x00\x00cpuJ"
    ).encode("latin-1")
    storage += struct.pack("<i", count) + b"tQ"
    return (
        b"\x80\x02ccollections\nOrderedDict\n)R(X"
        + struct.pack("<I", len(BIAS))
        + BIAS.encode()
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + (offset + size + stride).encode("latin-1")
        + b"\x89ccollections\nOrderedDict\n)RtRu."
    )


def pickled(data: bytes) -> Callable[[Path], None]:
    """Replaces data.pkl; the first storage becomes 31 zeros in float32."""

    def change(name: str, old: bytes) -> list[tuple[str, bytes]]:
        return [(name, data if name.endswith("data.pkl") else bytes(124) if name.endswith("data/0") else old)]

    return rebuilt(change)


def flipped(folder: Path) -> None:
    """One bit of one weight."""
    path = weight_file(folder)
    data = bytearray(path.read_bytes())
    data[data.index(TENSORS["decoder.layers.1.fc1.weight"].tobytes()) + 100] ^= 4
    path.write_bytes(data)


def patched(find: bytes, put: bytes, last: bool = False) -> Callable[[Path], None]:
    """Overwrites bytes of the file where `find` begins first, or last."""

    def damage(folder: Path) -> None:
        path = weight_file(folder)
        data = path.read_bytes()
        place = data.rindex(find) if last else data.index(find)
        path.write_bytes(data[:place] + put + data[place + len(put) :])

    return damage


def many_members(count: int, is_large: bool = False) -> Callable[[Path], None]:
    """A zip of one member, in whose directory are `count`; a large one says so in another record."""

    def damage(folder: Path) -> None:
        local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 6, 0) + b"000000"
        entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0)
        directory = b"".join(entry + b"%06x" % number for number in range(count))
        end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, len(directory), len(local), 0)
        if is_large:
            start = len(local) + len(directory)
            end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), len(local))
            end += struct.pack("<4sIQI", b"PK\6\7", 0, start, 1)
            end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
        weight_file(folder).write_bytes(local + directory + end)

    return damage


NESTED = b"\x80\x02}(" + b")" + b"\x85" * 1_000_000 + b"Nu."
PAYLOADS = [
    *(
        (f"{id}, protocol {protocol}", calling(make, pickle_protocol=protocol), FILE, says)
        for protocol in (2, 4)
        for id, make, says in [
            (
                "os.system",
                lambda canary: Payload(os.system, f"touch {canary}"),
                r"asks for posix\.system.*nothing was exec",
            ),
            ("exec", lambda canary: Payload(exec, f"open({str(canary)!r}, 'w')"), r"\.exec, which weights do not need"),
            ("eval", lambda canary: Payload(eval, f"open({str(canary)!r}, 'w')"), r"\.eval, which weights do not need"),
            ("open", lambda canary: Payload(open, str(canary), "w"), r"asks for _?io\.open"),
            ("os.mkdir", lambda canary: Payload(os.mkdir, str(canary)), r"asks for posix\.mkdir"),
            ("getattr", lambda canary: Payload(getattr, "", "join"), r"\.getattr, which weights do not need"),
        ]
    ),
    ("a call without GLOBAL", pickled(b"\x80\x02(S'id'\niposix\nsystem\n."), "data.pkl", "damaged pickle"),
    ("a call by the stack", pickled(b"\x80\x04\x8c\x05posix\x8c\x06system\x93."), "data.pkl", r"posix\.system"),
    ("a call by name", pickled(b"\x80\x02cposix\nsystem\n(X\x02\x00\x00\x00idtR."), "data.pkl", r"posix\.system"),
    ("a name of copyreg's registry", pickled(b"\x80\x02\x82\x01."), "data.pkl", "damaged pickle"),
    (
        "torch's own loader",
        pickled(b"\x80\x02ctorch.serialization\nload\n."),
        "data.pkl",
        r"torch\.serialization\.load",
    ),
    ("a name with dots", pickled(b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93."), "data.pkl", r"torch\.os\.system"),
    ("a module", saved(lambda path: {"a": torch.nn.Linear(2, 3)}), FILE, "torch.nn.modules.linear.Linear"),
    ("a class", saved({"a": pickle.PickleBuffer}), FILE, "pickle asks for"),
    ("a sparse tensor", saved({"a": torch.zeros(3).to_sparse()}), FILE, "pickle asks for"),
    ("a memo of 4 billion entries", pickled(b"\x80\x02}r\xff\xff\xff\xff."), "decoder.embed_tokens.weight", "missing"),
    ("a key of a million tuples", pickled(NESTED), "data.pkl", "expected names of tensors as keys|opcodes"),
    ("a text of 4 GB", pickled(b"\x80\x02X\xff\xff\xff\xffa."), "data.pkl", "damaged pickle"),
    ("a frame of 2^63 bytes", pickled(b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}."), BIAS, "missing, expected"),
    (
        "a number of 255 bytes as a key",
        pickled(b"\x80\x02}\x8a\xff" + b"\x7f" * 255 + b"Ns."),
        "data.pkl",
        "expected names",
    ),
    ("a list that holds itself", pickled(b"\x80\x02]q\x00h\x00a."), FILE, "expected a state dict"),
    (
        "a dict that holds itself",
        pickled(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."),
        FILE,
        "a: expected a named tensor",
    ),
    ("a pickle that ends early", pickled(state_pickle()[:-2]), "data.pkl", "damaged pickle"),
    ("an empty pickle", pickled(b""), "data.pkl", "damaged pickle"),
    ("nothing", pickled(b"\x80\x02N."), FILE, "expected a state dict, got NoneType"),
    (
        "a billion laughs",
        pickled(b"\x80\x02]q\x00" + b"".join(b"](" + b"h%c" % i * 9 + b"eq%c" % (i + 1) for i in range(40)) + b"."),
        FILE,
        "expected a state dict, got list",
    ),
]
ZIPS = [
    (
        "compressed members",
        rebuilt(lambda name, data: [(name, data)], compression=zipfile.ZIP_DEFLATED),
        "data.pkl",
        "expected a member stored as it is",
    ),
    (
        "a zip bomb",
        rebuilt(
            lambda name, data: [(name, bytes(2**26) if name.endswith("data/0") else data)],
            compression=zipfile.ZIP_DEFLATED,
        ),
        "data/0",
        "expected a member stored as it is",
    ),
    (
        "two members of one name",
        rebuilt(lambda name, data: [(name, data)] * (1 + name.endswith("data/3"))),
        "data/3",
        "two members of this name",
    ),
    (
        "two pickles",
        rebuilt(lambda name, data: [(name, data)] + [("b/data.pkl", data)] * name.endswith("data.pkl")),
        FILE,
        "expected one data.pkl in the zip, got 2",
    ),
    ("a missing storage", member("data/0", None), "model.decoder.embed_tokens.weight", "data/0 is not in the file"),
    (
        "a storage too short",
        member("data/0", bytes(8)),
        "model.decoder.embed_tokens.weight",
        "expected a storage of 8888",
    ),
    (
        "a storage too long",
        member("data/0", bytes(8892)),
        "model.decoder.embed_tokens.weight",
        "expected a storage of 8888",
    ),
    ("a million members", many_members(10**6), "directory", "expected at most 8388608 bytes, got 52000000"),
    ("a million members of a large zip", many_members(10**6, True), "directory", "expected at most 8388608 bytes"),
    ("a hundred members of a large zip", many_members(100, True), FILE, "expected one data.pkl in the zip"),
    ("big-endian numbers", member("byteorder", b"big"), "byteorder", "expected little"),
    ("no pickle", rebuilt(lambda name, data: [(name.replace(".pkl", ".txt"), data)]), FILE, "expected one data.pkl"),
    ("a pickle of 11 MB", member("data.pkl", b"\x80\x02" + b"N0" * 5_767_168 + b"N."), "data.pkl", "expected at most"),
    (
        "a local header that is another's",
        patched(b"archive/data/5", b"archive/data/6"),
        "data/5",
        "its local header is damaged",
    ),
    (
        "a directory that names another member",
        patched(b"archive/data/49", b"archive/data/48", last=True),
        "data/48",
        "two members",
    ),
    (
        "a zip inside a TorchScript",
        member("data.pkl", b"\x80\x02c__torch__\nModel\n)\x81."),
        "data.pkl",
        "__torch__|damaged pickle",
    ),
    (
        "from before torch 1.6",
        saved({"a": torch.zeros(3)}, _use_new_zipfile_serialization=False),
        FILE,
        "save it again",
    ),
    (
        "from before torch 1.6, with a payload",
        calling(lambda canary: Payload(os.system, f"touch {canary}"), _use_new_zipfile_serialization=False),
        FILE,
        "save it again",
    ),
]
TENSOR_PICKLES = [
    ("one element past its storage", dict(offset="K\x01"), "reaches past its storage"),
    ("a size past its storage", dict(size="(K\x20t"), "reaches past its storage"),
    ("a negative size", dict(size="(J\xff\xff\xff\xfft"), r"a tensor of shape \(-1,\)"),
    ("a negative offset", dict(offset="J\xff\xff\xff\xff"), "a tensor of shape"),
    ("a negative stride", dict(stride="(J\xff\xff\xff\xfft"), "a tensor of shape"),
    ("more sizes than strides", dict(size="(K\x1fK\x01t"), "a tensor of shape"),
    ("a size with a fraction", dict(size="(G?\xf0\0\0\0\0\0\0t"), "a tensor of shape"),
    ("a stride of zero", dict(stride="(K\x00t"), "zero or overlapping"),
    ("a storage that is longer in the pickle", dict(count=32), "expected a storage of 128 bytes, got 124"),
    ("a storage of -1 elements", dict(count=-1), "describes no storage"),
    ("a storage that is not there", dict(key="?"), "is not in the file"),
    ("a storage outside the data", dict(key="../version"), "is not in the file"),
]
STATES = [
    ("a list", [torch.zeros(2)], FILE, "expected a state dict, got list"),
    ("a number among the weights", {"step": 3}, "step", "expected a named tensor, got int"),
    ("a state dict in a dict", {"model": {"decoder.version": torch.ones(1)}}, "model", "expected a named tensor"),
    ("numbers as names", {7: torch.zeros(2)}, FILE, "expected names of tensors"),
    ("integers", {BIAS: torch.zeros(31, dtype=torch.int64)}, BIAS, "expected a dtype of .*, got int64"),
    ("complex numbers", {BIAS: torch.zeros(31, dtype=torch.complex64)}, BIAS, "expected a dtype of .*, got complex64"),
    ("no elements", {BIAS: torch.zeros(0)}, FILE, "empty tensor"),
    ("a bomb of 4 TB in 4 bytes", {BIAS: torch.zeros(1).expand(10**6, 10**6)}, FILE, "zero or overlapping strides"),
    ("windows that overlap", {BIAS: torch.zeros(9).as_strided((5, 5), (1, 1))}, FILE, "zero or overlapping strides"),
    ("strides that overlap", {BIAS: torch.zeros(20).as_strided((4, 4), (2, 3))}, FILE, "zero or overlapping strides"),
    ("a quantised tensor", quantised, FILE, "asks for"),
    (
        "the names of metaseq",
        {"decoder.layers.0.ffn_layernorm.weight": torch.zeros(31)},
        "ffn_layernorm",
        "not a weight",
    ),
]
CASES: list[Case] = [
    *cases("torch-bin", 2, [*PAYLOADS, *ZIPS]),
    *cases(
        "torch-bin",
        2,
        [("a flipped bit", flipped, "data/", "expected CRC .*the bytes are damaged")],
        opening=dict(verify=True),
    ),
    *cases("torch-bin", 3, [(id, pickled(state_pickle(**parts)), FILE, says) for id, parts, says in TENSOR_PICKLES]),
    *cases("torch-bin", 3, [(id, saved(state), names, says) for id, state, names, says in STATES]),
]
