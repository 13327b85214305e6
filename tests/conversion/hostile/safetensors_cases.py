"""Damaged safetensors: headers that are no JSON or disagree with the data, and tensors that are no weights."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.case import Case, cases
from hostile.container_cases import holding

FILE = "model.safetensors"
NAME = "model.decoder.layers.1.fc1.weight"


def with_header(header: bytes) -> Callable[[Path], None]:
    """Nothing but a header."""
    return holding(struct.pack("<Q", len(header)) + header)


def rewritten(change: Callable[[str], str], *, pad: int = 0, file: str = FILE) -> Callable[[Path], None]:
    """Replaces the header by `change` of its text; the tensors stay, and `pad` zeros follow."""

    def damage(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = change(data[8 : 8 + length].decode()).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :] + bytes(pad))

    return damage


def edited(change: Callable[[dict], Any], **options) -> Callable[[Path], None]:
    """As `rewritten`, by a function that changes the parsed header."""

    def apply(text: str) -> str:
        header = json.loads(text)
        change(header)
        return json.dumps(header)

    return rewritten(apply, **options)


def entry(name: str = NAME, **fields) -> Callable[[Path], None]:
    """Overwrites fields of one tensor."""
    return edited(lambda header: header[name].update(fields))


def renamed(new: str, old: str = NAME) -> Callable[[Path], None]:
    return edited(lambda header: header.update({new: header.pop(old)}))


def twice(name: str = NAME) -> Callable[[Path], None]:
    again = f'{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},'
    return rewritten(lambda text: again + text[1:])


def declared(shape: list[int]) -> Callable[[Path], None]:
    """A sparse file that is as long as its one tensor of `shape`."""

    def damage(folder: Path) -> None:
        nbytes = 4
        for size in shape:
            nbytes *= size
        header = json.dumps({NAME: dict(dtype="F32", shape=shape, data_offsets=[0, nbytes])}).encode()
        with open(folder / FILE, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + nbytes)

    return damage


DEEP = b'{"a":' * 100_000
MANY = with_header(b"{" + b",".join(b'"%x":{}' % number for number in range(300_000)) + b"}")
HEADERS = [
    ("a header longer than any", holding(struct.pack("<Q", 2**63) + b"{}"), FILE, "header: expected at most"),
    ("a header longer than 4 MB", holding(struct.pack("<Q", 2**24) + b"{}" + bytes(2**24)), FILE, "expected at most"),
    ("a header longer than the file", holding(struct.pack("<Q", 99) + b"{}"), FILE, "truncated: the header says 99"),
    ("three bytes", holding(b"\1\2\3"), FILE, "got 3 bytes"),
    ("a list as a header", with_header(b"[]"), FILE, "expected a JSON object, got list"),
    ("a header that is no JSON", with_header(b"{]"), FILE, "not valid JSON"),
    ("a header that is no UTF-8", with_header(b"\xff\xfe"), FILE, "not valid JSON"),
    ("lists in one another as a header", with_header(b"[" * 200_000), FILE, "not valid JSON"),
    ("objects in one another as a header", with_header(DEEP), FILE, "not valid JSON"),
    ("a number of 5000 digits as a header", with_header(b'{"a":' + b"9" * 5000 + b"}"), FILE, "not valid JSON"),
    ("a million lists", with_header(b'{"a":[' + b"[]," * 1_300_000 + b"[]]}"), FILE, "a: expected an object of dtype"),
    ("300,000 entries", MANY, FILE, "300000 problems"),
    ("no tensors", with_header(b"{}"), "decoder.embed_tokens.weight", "missing, expected"),
    (
        "metadata that is a number",
        rewritten(lambda text: text.replace('"pt"', "1")),
        "__metadata__",
        "object of strings",
    ),
    ("metadata that is a list", edited(lambda h: h.update(__metadata__=["pt"])), "__metadata__", "object of strings"),
    ("metadata twice", rewritten(lambda text: '{"__metadata__":{},' + text[1:]), FILE, "duplicate key '__metadata__'"),
    *(
        (f"metadata of {word}", edited(lambda h, word=word: h["__metadata__"].update(format=word)), names, says)
        for word, names, says in [
            ("tf", NAME, "not a weight of OPT in tf-safetensors"),
            ("flax", NAME, "not a weight of OPT in flax-safetensors"),
            ("mlx", FILE, "expected metadata with format 'pt', got 'mlx'"),
        ]
    ),
]
ENTRIES = [
    ("a name twice", twice(), NAME, "duplicate key"),
    (
        "two tensors on the same bytes",
        edited(lambda h: h.update({"model.decoder.layers.9.fc1.weight": h[NAME]})),
        "layers.9.fc1.weight",
        "a gap or an overlap",
    ),
    ("bytes after the last tensor", rewritten(str, pad=5), FILE, "5 bytes follow the last tensor"),
    ("a tensor left out of the header", edited(lambda h: h.pop(NAME)), "layers.1.", "a gap or an overlap"),
    ("more elements than bytes", entry(shape=[31, 23]), NAME, "expected 2852 bytes for F32"),
    ("a product of sizes over 64 bits", entry(shape=[2**40, 2**40]), NAME, "expected .* bytes for F32"),
    ("negative sizes", entry(shape=[-31, -22]), NAME, "positive integers, got"),
    ("sizes with a fraction", entry(shape=[31.0, 22]), NAME, "positive integers"),
    ("a size that is true", entry(shape=[True, 682]), NAME, "positive integers"),
    ("a size of zero beside a giant one", entry(shape=[0, 2**62], data_offsets=[0, 0]), NAME, "positive integers"),
    ("no shape", entry(shape=None), NAME, "positive integers, got None"),
    ("a shape of a thousand sizes", entry(shape=[1] * 1000), NAME, "at most 8"),
    ("offsets of the first tensor", entry(data_offsets=[0, 2728]), "layers.1.fc1.bias", "a gap or an overlap"),
    ("offsets behind the file", entry(data_offsets=[10**15, 10**15 + 2728]), NAME, "truncated"),
    ("offsets that run backwards", entry(data_offsets=[8, 4]), NAME, "a start and an end, got"),
    ("negative offsets", entry(data_offsets=[-2728, 0]), NAME, "a start and an end"),
    ("one offset", entry(data_offsets=[0]), NAME, "a start and an end"),
    ("a field that is unknown", entry(extra=1), NAME, "an object of dtype, shape and data_offsets"),
    ("an entry that is a number", edited(lambda h: h.update({NAME: 7})), NAME, "expected an object of"),
    (
        "a sparse terabyte",
        declared([2**19, 2**19]),
        "decoder.layers.1.fc1.weight",
        r"expected \(31, 22\), got \(524288",
    ),
]
DTYPES = [
    ("integers", entry(dtype="I64", shape=[341]), NAME, "expected a dtype of .*, got I64"),
    ("eight bits", entry(dtype="F8_E4M3", shape=[2728]), NAME, "expected a dtype of .*, got F8_E4M3"),
    ("truth values", entry(dtype="BOOL", shape=[2728]), NAME, "expected a dtype of .*, got BOOL"),
    ("a dtype nobody knows", entry(dtype="F33"), NAME, "expected a dtype of .*, got F33"),
    ("a dtype that is a number", entry(dtype=7), NAME, "expected a word, got 7"),
    ("half the width", entry(dtype="F16"), NAME, "expected 1364 bytes for F16"),
    ("twice the width", entry(dtype="F64"), NAME, "expected 5456 bytes for F64"),
    ("GPTQ", entry(dtype="I32"), NAME, "expected a dtype"),
    ("a quantised weight", renamed("model.decoder.layers.1.fc1.qweight"), "fc1.qweight", "a quantised file"),
    ("the scale of bitsandbytes", renamed("model.decoder.layers.1.fc1.SCB"), "fc1.SCB", "a quantised file"),
    (
        "absmax of bitsandbytes",
        renamed("model.decoder.layers.1.fc1.weight.absmax"),
        "weight.absmax",
        "a quantised file",
    ),
    ("a LoRA adapter", renamed("base_model.model.decoder.layers.1.fc1.lora_A.weight"), "lora_A.weight", "LoRA adapter"),
    ("a nested model", renamed("language_model.model.decoder.layers.1.fc1.weight"), "language_model", "contains OPT"),
    ("a path as a name", renamed("../../etc/passwd"), "../../etc/passwd", "not a weight of OPT"),
    ("a name of nothing", renamed(""), ": not a weight", "not a weight of OPT"),
    ("a name of a megabyte", renamed("x" * 2**20), "xxxx", "not a weight of OPT"),
    ("a name that clears the screen", renamed("\x1b[2Jdecoder"), r"\x1b[2Jdecoder", "not a weight of OPT"),
    ("half a character in a name", renamed("\ud800decoder"), r"\ud800decoder", "not a weight of OPT"),
    ("a name with a line break", renamed("decoder\nlayers"), "decoder", "not a weight of OPT"),
    (
        "a weight under two names",
        renamed("decoder.layers.2.fc1.weight"),
        "decoder.layers.2.fc1.weight",
        "stored twice, as",
    ),
    ("a layer of number 01", renamed("model.decoder.layers.01.fc1.weight"), "layers.01", "not a weight of OPT"),
    ("a layer of number -1", renamed("model.decoder.layers.-1.fc1.weight"), "layers.-1", "not a weight of OPT"),
    ("a layer of number 10^30", renamed(f"model.decoder.layers.{10**30}.fc1.weight"), "layers.1000", "not a weight"),
    ("Arabic digits in a layer", renamed("model.decoder.layers.١.fc1.weight"), "layers.١", "not a weight of OPT"),
]
CASES: list[Case] = [
    *cases("safetensors", 1, HEADERS),
    *cases("safetensors", 3, [*ENTRIES, *DTYPES]),
    *cases(
        "flax-safetensors",
        3,
        [
            (
                "published names",
                renamed("decoder.layers.1.fc1.weight", "model.decoder.layers.1.fc1.kernel"),
                "decoder.layers.1.fc1.weight",
                "not a weight of OPT in flax-safetensors",
            ),
            (
                "a kernel that was not turned",
                entry("model.decoder.layers.1.fc1.kernel", shape=[31, 22]),
                "decoder.layers.1.fc1.weight",
                r"expected \(31, 22\), got \(22, 31\)",
            ),
            (
                "integers",
                entry("model.decoder.layers.1.fc1.kernel", dtype="I32"),
                "model.decoder.layers.1.fc1.kernel",
                "expected a dtype",
            ),
        ],
    ),
    *cases(
        "tf-safetensors",
        3,
        [
            (
                "published names",
                renamed("model.decoder.layers.1.fc1.weight", "model/decoder/layers.1/fc1/kernel:0"),
                "decoder.layers.1.fc1.weight",
                "not a weight of OPT in tf-safetensors",
            ),
            (
                "a kernel that was not turned",
                entry("model/decoder/layers.1/fc1/kernel:0", shape=[31, 22]),
                "decoder.layers.1.fc1.weight",
                r"expected \(31, 22\), got \(22, 31\)",
            ),
            (
                "integers",
                entry("model/decoder/layers.1/fc1/kernel:0", dtype="I32"),
                "model/decoder/layers.1/fc1/kernel:0",
                "expected a dtype",
            ),
        ],
    ),
]
