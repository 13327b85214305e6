"""Damaged CTranslate2 models: headers that promise too much, variables that are no weights, settings of others."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hostile.bases_by_hand import CTranslate2Model, text
from hostile.case import Case, cases

FILE = "model.bin"
NAME = "decoder/layer_1/ffn/linear_0/weight"
SHAPE = (31, 22)


def made(change: Callable[[CTranslate2Model], Any], more: bytes = b"") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        model = CTranslate2Model()
        change(model)
        (folder / FILE).write_bytes(bytes(model) + more)

    return damage


def variable(name: str = NAME, shape=SHAPE, type_: int = 0, content: bytes | None = None) -> Callable[[Path], None]:
    data = bytes(int(np.prod(shape)) * 4) if content is None else content
    return made(lambda model: model.variables.update({name: [shape, type_, data]}))


def setting(name: str, value: float, type_: int = 1, format: str = "<b") -> Callable[[Path], None]:
    content = struct.pack(format, value)
    return made(lambda model: model.variables.update({f"decoder/{name}": [(), type_, content]}))


def header(data: bytes) -> Callable[[Path], Any]:
    """A file of one header."""
    return lambda folder: (folder / FILE).write_bytes(data)


def written(file: str, value: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_text(value if isinstance(value, str) else json.dumps(value))


START = struct.pack("<I", 6) + text("TransformerDecoderSpec") + struct.pack("<I", 8)
ONE = struct.pack("<I", 1) + text(NAME)
HEADERS = [
    ("a version of tomorrow", made(lambda model: setattr(model, "version", 7)), FILE, "expected"),
    ("a version of 2018", made(lambda model: setattr(model, "version", 1)), FILE, "version: expected one of 4, 5, 6"),
    (
        "a revision of tomorrow",
        made(lambda model: setattr(model, "revision", 99)),
        "revision",
        "expected 1 to 8, got 99",
    ),
    ("an encoder", made(lambda model: setattr(model, "specification", "TransformerSpec")), "no weights", "model"),
    ("4 billion variables", header(START + b"\xff" * 4), "variables", "expected at most"),
    (
        "a count of one variable more",
        made(lambda model: setattr(model, "count", len(model.variables) + 1)),
        FILE,
        "expected",
    ),
    (
        "a count of one variable less",
        made(lambda model: setattr(model, "count", len(model.variables) - 1)),
        FILE,
        "expected",
    ),
    (
        "a name of 65,535 bytes",
        header(START + struct.pack("<IH", 1, 65535) + bytes(99)),
        "variable 0",
        "expected up to 255",
    ),
    (
        "a name without an end",
        header(START + struct.pack("<IH", 1, 3) + b"abc" + bytes(99)),
        "variable 0",
        "and a zero",
    ),
    (
        "a name that is no text",
        header(START + struct.pack("<IH", 1, 3) + b"\xff\xfe\0" + bytes(99)),
        "variable 0",
        "of text",
    ),
    ("255 axes", header(START + ONE + b"\xff" * 1100), NAME, "expected at most 8 axes, got 255"),
    ("4 GB in nothing", header(START + ONE + struct.pack("<BIBI", 1, 2**30 - 1, 0, 2**32 - 4)), NAME, "truncated"),
    ("bytes after the aliases", made(lambda model: None, more=b"abcde"), FILE, "5 bytes follow the last alias"),
    ("4 billion aliases", header(START + bytes(4) + b"\xff" * 4), "aliases", "expected at most"),
]
VARIABLES = [
    ("more elements than bytes", variable(shape=(31, 23), content=bytes(2728)), NAME, "expected 2852 bytes"),
    ("2^96 elements", variable(shape=(2**32 - 1,) * 3, content=bytes(2728)), NAME, "expected 316912649835"),
    ("a size of zero", variable(shape=(0, 2**31), content=b""), NAME, "axes of positive length"),
    ("a type of number 9", variable(type_=9), NAME, "a type below 6"),
    (
        "eight bits",
        variable(type_=1, content=bytes(682)),
        NAME,
        "expected a dtype of .*got int8.*convert the original again",
    ),
    ("sixteen bits", variable(type_=2, content=bytes(1364)), NAME, "expected a dtype of .*got int16"),
    ("integers", variable(type_=3), NAME, "expected a dtype of .*got int32"),
    ("another shape", variable(shape=(22, 31)), "decoder.layers.1.fc1.weight", r"expected \(31, 22\), got \(22, 31\)"),
    (
        "a joint tensor that three does not divide",
        variable("decoder/layer_1/self_attention/linear_0/weight", (65, 22)),
        "self_attn",
        "expected",
    ),
    (
        "a scale of quantised weights",
        variable("decoder/layer_1/ffn/linear_0/weight_scale", (31,)),
        "weight_scale",
        "not a weight",
    ),
    (
        "a weight of an encoder",
        variable("encoder/layer_1/ffn/linear_0/weight"),
        "encoder/layer_1",
        "not a weight of OPT",
    ),
    ("a layer of number 9", variable("decoder/layer_9/ffn/linear_0/weight"), "layers", "got one numbered 9"),
    (
        "a layer of number 10^9",
        variable("decoder/layer_1000000000/ffn/linear_0/weight"),
        "layer_1000000000",
        "not a weight",
    ),
    (
        "an embedding of one axis",
        variable("decoder/embeddings/weight", (2222,)),
        "embeddings/weight",
        "expected two axes",
    ),
    (
        "no embedding",
        made(lambda m: (m.variables.pop("decoder/embeddings/weight"), m.aliases.clear())),
        "decoder/embeddings/weight",
        "missing",
    ),
    ("no positions", made(lambda m: m.variables.pop("decoder/position_encodings/encodings")), "encodings", "missing"),
    (
        "a weight that is missing",
        made(lambda m: m.variables.pop(NAME)),
        "decoder.layers.1.fc1.weight",
        "missing, expected",
    ),
    (
        "an alias of nothing",
        made(lambda m: m.aliases.update({"a": "b"})),
        "a",
        "an alias of b, which is not a variable",
    ),
    ("an alias of itself", made(lambda m: m.aliases.update({"a": "a"})), "a", "an alias of a, which is not a variable"),
    (
        "an alias that is a variable",
        made(lambda m: m.aliases.update({NAME: "decoder/embeddings/weight"})),
        NAME,
        "stored twice",
    ),
]
SETTINGS = [
    ("alibi", setting("alibi", 1), "alibi", "OPT has 0, got 1"),
    ("scaled embeddings", setting("scale_embeddings", 1), "scale_embeddings", "OPT has 0, got 1"),
    ("a setting of others", setting("rotary_dim", 64), "rotary_dim", "not a setting of OPT"),
    ("an activation of number 77", setting("activation", 77), "activation", "expected one of 0 .relu."),
    ("no heads", made(lambda m: m.variables.pop("decoder/num_heads")), "num_heads", "missing among the settings"),
    ("heads that do not divide the width", setting("num_heads", 7), "hidden_size", "a multiple of"),
    ("minus one head", setting("num_heads", -1), "num_attention_heads", "expected an integer from 1"),
    ("half a head", setting("num_heads", 0.5, 0, "<f"), "num_attention_heads", "expected an integer"),
    ("heads that are NaN", setting("num_heads", np.nan, 0, "<f"), "num_attention_heads", "expected an integer"),
    ("an activation that is infinite", setting("activation", np.inf, 0, "<f"), "activation", "expected one of"),
]
BESIDE = [
    ("another epsilon", written("config.json", {"layer_norm_epsilon": 1e-6}), "layer_norm_epsilon", "OPT has 1e-05"),
    ("an epsilon that is a list", written("config.json", {"layer_norm_epsilon": [1]}), "layer_norm_epsilon", "OPT has"),
    ("a config that is no JSON", written("config.json", "{"), "config.json", "not valid JSON"),
    ("a config over 10 MB", written("config.json", " " * (10 * 2**20 + 1)), "config.json", "expected at most"),
    ("a vocabulary of fewer tokens", written("vocabulary.json", ["a"]), "vocabulary.json", "expected 101 tokens"),
    ("a vocabulary of numbers", written("vocabulary.json", [7] * 101), "vocabulary.json", "expected a list of tokens"),
    (
        "a vocabulary that is an object",
        written("vocabulary.json", {"a": 1}),
        "vocabulary.json",
        "expected a list of tokens",
    ),
    (
        "a vocabulary of lists in one another",
        written("vocabulary.json", "[" * 100_000),
        "vocabulary.json",
        "not valid JSON",
    ),
    (
        "a vocabulary over 10 MB",
        written("vocabulary.json", " " * (10 * 2**20 + 1)),
        "vocabulary.json",
        "expected at most",
    ),
]
CASES: list[Case] = [
    *cases("ctranslate2", 11, HEADERS),
    *cases("ctranslate2", 3, VARIABLES),
    *cases("ctranslate2", 10, [*SETTINGS, *BESIDE]),
]
