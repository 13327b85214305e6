"""Damaged KerasHub presets: HDF5 that is hostile, configs of other models, shards that disagree with their index."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hostile.bases import weight_files
from hostile.case import Case, cases
from hostile.h5_cases import dataset, linked, opened, with_more

FILE, CONFIG, INDEX = "model.weights.h5", "config.json", "model.weights.json"
KERNEL = "layers/transformer_decoder_1/_feedforward_intermediate_dense/vars/0"
WEIGHT = "decoder.layers.1.fc1.weight"
SHAPE = (22, 31)


def at(**options) -> Callable[[Path], None]:
    return dataset(KERNEL, FILE, **options)


def link(target: object, place: str = KERNEL) -> Callable[[Path], None]:
    return linked(target, place, FILE)


def in_json(change: Callable[[dict], Any], file: str = CONFIG) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / file).read_text())
        change(fields)
        (folder / file).write_text(json.dumps(fields))

    return damage


def argument(name: str, value: Any) -> Callable[[Path], None]:
    return in_json(lambda fields: fields["config"].update({name: value}))


def in_index(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    return in_json(lambda index: change(index["weight_map"]), INDEX)


def first_in(files: Any) -> Callable[[Path], None]:
    return in_index(lambda groups: groups.update({min(groups): files}))


def written(file: str, data: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_text(data)


def shard(number: int, change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: change(weight_files(folder)[number])


def copied(folder: Path) -> None:
    first, *_, last = weight_files(folder)
    last.write_bytes(first.read_bytes())


def lora(h5: h5py.File) -> None:
    h5["layers/transformer_decoder_1/_feedforward_intermediate_dense/vars/2"] = np.zeros((22, 4), "f4")


LINKS = [
    ("a soft link", link(h5py.SoftLink("/layers")), KERNEL, "got a soft or external link"),
    ("a link to another file", link(h5py.ExternalLink("/etc/hostname", "/")), KERNEL, "got a soft or external link"),
    ("a group in itself", link("layers", "layers/loop"), "layers/loop", "expected a tree"),
    (
        "data in another file",
        at(shape=SHAPE, dtype="f4", external=[("/etc/hostname", 0, 2728)]),
        KERNEL,
        "external or virtual",
    ),
    ("4 TB in nothing", at(shape=(10**6, 10**6), dtype="f4"), KERNEL, "expected 4000000000000 bytes"),
    ("4 TB in chunks", at(shape=(10**6, 10**6), dtype="f4", chunks=(10, 10)), KERNEL, "at least one byte for 1000"),
    ("lzf", at(data=np.zeros(SHAPE, "f4"), compression="lzf"), KERNEL, "no filters but gzip and shuffle"),
    ("texts", at(data=np.array([b"x"], object), dtype=h5py.string_dtype()), KERNEL, "expected a dtype"),
    ("integers", at(data=np.zeros(SHAPE, np.int8)), KERNEL, "expected a dtype of .*, got int8"),
    ("no rows", at(shape=(0, 31), dtype="f4"), KERNEL, "positive length"),
    ("a weight that was turned", at(data=np.zeros(SHAPE[::-1], "f4")), WEIGHT, r"expected \(31, 22\), got \(22, 31\)"),
    ("a weight that is missing", opened(lambda h5: h5.__delitem__(KERNEL), FILE), WEIGHT, "missing, expected"),
    (
        "a weight of nobody",
        with_more("layers/x/vars/0", np.zeros(3, "f4"), file=FILE),
        "layers/x/vars/0",
        "not a weight of OPT",
    ),
    ("LoRA in the layer", opened(lora, FILE), "vars/2", "not a weight of OPT"),
    (
        "the names of Keras 2 beside those of 3",
        with_more("_layer_checkpoint_dependencies/layer_normalization/vars/0", np.zeros(22, "f4"), file=FILE),
        "layers/layer_normalization/vars/0",
        "stored twice",
    ),
]
CONFIGS = [
    ("a preset without its config", lambda folder: (folder / CONFIG).unlink(), CONFIG, "missing|expected"),
    (
        "another class",
        in_json(lambda fields: fields.update(class_name="GPT2Backbone")),
        "class_name",
        "got GPT2Backbone",
    ),
    (
        "a class of code",
        in_json(lambda f: f.update(class_name="__lambda__", module="builtins")),
        "class_name",
        "expected OPTBackbone",
    ),
    ("no arguments", in_json(lambda fields: fields.update(config=7)), "class_name", "expected OPTBackbone"),
    (
        "an argument of others",
        argument("num_key_value_heads", 2),
        "num_key_value_heads",
        "not an argument of OPTBackbone",
    ),
    ("an argument less", in_json(lambda fields: fields["config"].pop("num_heads")), "num_heads", "missing"),
    ("quantised weights", argument("dtype", "int8_from_float32"), "dtype", "quantised weights"),
    ("10^9 layers", argument("num_layers", 10**9), "num_hidden_layers", "expected an integer"),
    ("a layer more", argument("num_layers", 4), "decoder.layers.3.fc1.weight", "missing, expected"),
    ("a layer less", argument("num_layers", 2), "decoder.layers.2.fc1.weight", "unexpected, got"),
    ("a wider feed-forward", argument("intermediate_dim", 37), WEIGHT, r"expected \(37, 22\), got \(31, 22\)"),
    ("other heads", argument("num_heads", 11), "self_attn.q_proj", "expected"),
    ("heads that do not divide the width", argument("num_heads", 7), "hidden_size", "a multiple of"),
    ("a text for a size", argument("hidden_dim", "22"), "hidden_size", "expected an integer"),
    ("a config that is no JSON", written(CONFIG, "{"), CONFIG, "not valid JSON"),
    ("a config of lists in one another", written(CONFIG, '{"class_name":' * 50_000), CONFIG, "not valid JSON"),
    (
        "a task in a task",
        written(CONFIG, '{"class_name":"OPTCausalLM","config":{"backbone":' * 400 + "7" + "}}" * 400),
        CONFIG,
        "expected at most 64 objects and lists",
    ),
    (
        "a vocabulary that is no JSON",
        lambda folder: (
            (folder / "assets" / "tokenizer").mkdir(parents=True),
            (folder / "assets/tokenizer/vocabulary.json").write_text("{"),
        ),
        "vocabulary.json",
        "not valid JSON",
    ),
]
PLAIN = "expected model_00000.weights.h5 or the like, beside the index"
SHARDS = [
    ("a missing shard", shard(1, Path.unlink), "model_00001.weights.h5", "missing, expected beside the index"),
    ("one shard in two places", copied, "model_00000.weights.h5", "stored in model_00000"),
    (
        "a shard that is cut",
        shard(1, lambda path: path.write_bytes(path.read_bytes()[:-1])),
        "model_00001",
        "truncated|damaged",
    ),
    ("a shard of text", shard(1, lambda path: path.write_bytes(b"{}")), "model_00001", "expected HDF5"),
    ("a shard in the parent folder", first_in("../model_00000.weights.h5"), "../model_00000", PLAIN),
    ("a shard from the root", first_in("/etc/model_00000.weights.h5"), "/etc/model_00000", PLAIN),
    ("a shard that is a number", first_in(7), INDEX, "expected a file name or a list of them"),
    ("a group in no shard", first_in([]), INDEX, "expected a file name or a list of them"),
    ("a group that the index lacks", in_index(lambda groups: groups.pop(max(groups))), "vars", "not in the index"),
    (
        "a group that no shard has",
        in_index(lambda g: g.update({"/more/vars": g[max(g)]})),
        "more/vars",
        "where it is not",
    ),
    ("an index that is a list", written(INDEX, "[]"), INDEX, "expected a JSON object"),
    ("an index without a map", written(INDEX, "{}"), INDEX, "weight_map: expected an object"),
    ("an index with a group twice", written(INDEX, '{"weight_map":{"a":"b","a":"c"}}'), INDEX, "duplicate key 'a'"),
    ("an index over 10 MB", written(INDEX, " " * (10 * 2**20 + 1)), INDEX, "expected at most 10485760 bytes"),
]
CASES: list[Case] = [
    *cases("keras-hub", 8, LINKS),
    *cases("keras-hub", 10, CONFIGS),
    *cases("keras-hub in shards", 4, SHARDS),
]
