"""Configs that describe no OPT model, and configs of another model than the one beside them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.bases import CONFIG, TENSORS
from hostile.case import Case, cases

FILE = "config.json"
FORMATS = ("safetensors", "torch-bin", "flax-msgpack", "flax-safetensors", "tf-h5", "tf-safetensors")
WITH_PUBLISHED_CONFIG = ("orbax", "tf-checkpoint", "saved-model")
NAME = "decoder.layers.1.fc1"


def field(name: str, value) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / FILE).read_text())
        (folder / FILE).write_text(json.dumps({**config, name: value}))

    return damage


def text(data: bytes | str) -> Callable[[Path], Any]:
    return lambda folder: (folder / FILE).write_bytes(data.encode() if isinstance(data, str) else data)


def of_another(**changes) -> Callable[[Path], None]:
    """The config of a model that differs in `changes`."""
    return lambda folder: CONFIG.replace(**changes).to_json(folder)


def stored(change: Callable[[dict], dict], **config) -> Callable[[Path], None]:
    """A safetensors file of other tensors than the config's, by their published names."""

    def damage(folder: Path) -> None:
        from safetensors.numpy import save_file

        tensors = change({f"model.{name}": array for name, array in TENSORS.items()})
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        CONFIG.replace(**config).to_json(folder)

    return damage


def without(*names: str, **config) -> Callable[[Path], None]:
    return stored(lambda tensors: {name: a for name, a in tensors.items() if not name.endswith(names)}, **config)


def with_another_head(tensors: dict) -> dict:
    return {**tensors, "lm_head.weight": tensors["model.decoder.embed_tokens.weight"] + 1}


def turned(tensors: dict) -> dict:
    return {**tensors, f"model.{NAME}.weight": tensors[f"model.{NAME}.weight"].T.copy()}


def flat(tensors: dict) -> dict:
    return {**tensors, f"model.{NAME}.weight": tensors[f"model.{NAME}.weight"].reshape(-1)}


OTHER_MODELS = [
    (
        "a config of a wider feed-forward",
        of_another(ffn_dim=37),
        f"{NAME}.weight",
        r"expected \(37, 22\), got \(31, 22\)",
    ),
    ("a config of one layer less", of_another(num_hidden_layers=2), "decoder.layers.2.fc1.weight", "unexpected, got"),
    ("a config of one layer more", of_another(num_hidden_layers=4), "decoder.layers.3.fc1.weight", "missing, expected"),
    (
        "a config of more tokens",
        of_another(vocab_size=103),
        "embed_tokens.weight",
        r"expected \(103, 22\), got \(101, 22\)",
    ),
    (
        "a config of fewer positions",
        of_another(max_position_embeddings=36),
        "embed_positions",
        r"expected \(38, 22\), got",
    ),
    (
        "a config without the final norm",
        of_another(do_layer_norm_before=False),
        "decoder.final_layer_norm",
        "unexpected",
    ),
    (
        "a config with the final norm removed",
        of_another(_remove_final_layer_norm=True),
        "decoder.final_layer_norm",
        "tensors are those of a config with _remove_final_layer_norm=false",
    ),
]
ALWAYS_ON = [
    ("a config without biases", of_another(enable_bias=False), f"{NAME}.bias", "a config with enable_bias=true"),
    (
        "a config without weights in norms",
        of_another(layer_norm_elementwise_affine=False),
        "layer_norm",
        "a config with layer_norm_elementwise_affine=true",
    ),
    (
        "a config of narrower embeddings",
        of_another(word_embed_proj_dim=13),
        "decoder.project_in.weight",
        "missing, expected",
    ),
]
TENSOR_SETS = [
    (
        "a gap among the layers",
        stored(lambda t: {n: a for n, a in t.items() if ".1." not in n}),
        f"{NAME}.weight",
        "missing, expected",
    ),
    (
        "no final norm, against the config",
        without("decoder.final_layer_norm.weight", "decoder.final_layer_norm.bias"),
        "decoder.final_layer_norm.weight",
        "_remove_final_layer_norm=true",
    ),
    (
        "a final norm without its bias",
        without("decoder.final_layer_norm.bias"),
        "decoder.final_layer_norm.bias",
        "missing",
    ),
    ("biases on some layers only", without("1.fc1.bias", "1.fc2.bias"), f"{NAME}.bias", "missing, expected"),
    ("biases against the config", without("2.fc1.bias", enable_bias=False), f"{NAME}.bias", "unexpected, got"),
    (
        "a projection in without one out",
        stored(lambda t: {**t, "model.decoder.project_in.weight": t["model.decoder.embed_tokens.weight"]}),
        "decoder.project_in.weight",
        "unexpected, got",
    ),
    (
        "a head that is not the embedding",
        stored(with_another_head),
        "lm_head.weight",
        "tie_word_embeddings=false keeps both",
    ),
    (
        "a weight that is missing",
        without("layers.1.self_attn.k_proj.weight"),
        "decoder.layers.1.self_attn.k_proj.weight",
        r"missing, expected \(22, 22\)",
    ),
    (
        "a weight of another class",
        stored(lambda t: {**t, "score.weight": t["model.decoder.embed_tokens.weight"]}),
        "score.weight",
        "expected|unexpected",
    ),
    ("a weight that was turned", stored(turned), f"{NAME}.weight", r"expected \(31, 22\), got \(22, 31\)"),
    ("a weight of one axis", stored(flat), f"{NAME}.weight", r"expected \(31, 22\), got \(682,\)"),
    (
        "nothing but a head",
        stored(lambda t: {"lm_head.weight": t["model.decoder.embed_tokens.weight"]}),
        "layers.0",
        "missing",
    ),
]
SIZES = [
    (f"{name} of {value if isinstance(value, (int, float)) else type(value).__name__}", name, value)
    for name in ("hidden_size", "vocab_size", "ffn_dim", "max_position_embeddings", "num_attention_heads")
    for value in (0, -1, 10**9, 22.0)
]
VALUES = [
    *SIZES,
    ("a layer count of a billion", "num_hidden_layers", 10**9),
    ("a layer count of 10^400", "num_hidden_layers", 10**400),
    ("a layer count of -1", "num_hidden_layers", -1),
    ("true for a size", "hidden_size", True),
    ("null for a size", "hidden_size", None),
    ("a text for a size", "hidden_size", "22"),
    ("a list for a size", "ffn_dim", [31]),
    ("a text for a switch", "enable_bias", "false"),
    ("a number for a switch", "tie_word_embeddings", 1),
    ("an unknown activation", "activation_function", "swiglu"),
    ("code for an activation", "activation_function", "__import__('os').system('id')"),
    ("an unknown dtype", "torch_dtype", "int8"),
    ("a dropout of 2", "dropout", 2),
    ("a negative deviation", "init_std", -1),
    ("a pad id outside the vocabulary", "pad_token_id", 101),
    ("a text for a token", "eos_token_id", "</s>"),
    ("labels that are a list", "id2label", ["a"]),
    ("labels that are lists", "id2label", {"0": [1], "1": "b"}),
    ("architectures that are a number", "architectures", 7),
    ("architectures in lists", "architectures", [["OPTModel"]]),
    ("another model", "model_type", "gpt2"),
    ("rotary positions", "rotary", True),
    ("scaled embeddings", "scale_embeddings", True),
    ("positions that are not learned", "learned_embeddings", False),
]
TEXTS = [
    ("an empty config", "", "not valid JSON"),
    ("a config that is a list", "[]", "expected a JSON object, got list"),
    ("a config that ends early", '{"vocab_size": 101', "not valid JSON"),
    ("a config that is no UTF-8", b"\xff\xfe{}", "not valid JSON"),
    ("a config with a byte-order mark", b"\xef\xbb\xbf{}", "not valid JSON"),
    ("a field twice", '{"vocab_size": 101, "vocab_size": 103}', "duplicate key 'vocab_size'"),
    ("NaN as a number", '{"init_std": NaN}', "NaN is not JSON"),
    ("an infinite number", '{"init_std": 1e999}', "1e999 is not a finite number"),
    ("lists in one another", "[" * 100_000, "not valid JSON"),
    ("lists too deep to be copied", '{"more": ' + "[" * 700 + "]" * 700 + "}", "expected at most 64 objects and lists"),
    ("objects too deep to be copied", '{"a":' * 400 + "1" + "}" * 400, "expected at most 64 objects and lists"),
    ("5 MB of unknown fields", '{"a": [' + "[]," * 1_700_000 + "[]]}", "at most 1048576 bytes of fields that OPT"),
    ("a number of 5000 digits", '{"vocab_size": ' + "9" * 5000 + "}", "not valid JSON"),
    ("a config over 10 MB", " " * (10 * 2**20 + 1), "expected at most 10485760 bytes"),
]


def no_config(folder: Path) -> None:
    (folder / FILE).unlink()


def folder_for_config(folder: Path) -> None:
    no_config(folder)
    (folder / FILE).mkdir()


CASES: list[Case] = [
    *(case for format in (*FORMATS, *WITH_PUBLISHED_CONFIG) for case in cases(format, 6, OTHER_MODELS)),
    *(case for format in ("safetensors", "torch-bin", "tf-h5", "flax-msgpack") for case in cases(format, 6, ALWAYS_ON)),
    *cases("safetensors", 6, TENSOR_SETS),
    *cases("safetensors", 10, [(id, field(name, value), name, "expected|OPT has") for id, name, value in VALUES]),
    *cases("safetensors", 10, [(id, text(data), FILE, says) for id, data, says in TEXTS]),
    *cases(
        "safetensors",
        10,
        [
            ("a width that heads do not divide", field("num_attention_heads", 3), "hidden_size", "a multiple of"),
            ("two names for one field that disagree", field("bias", False), "bias", "contradicts enable_bias"),
            ("1,000 layers that are not there", field("num_hidden_layers", 1000), "layers.3.", "missing, expected"),
            ("10,000 layers that are not there", field("num_hidden_layers", 10_000), "layers.3.", r"and \d+ more"),
            ("no config", no_config, FILE, "missing; put it beside the weights"),
            ("a folder for a config", folder_for_config, FILE, "missing; put it beside the weights"),
        ],
    ),
]
