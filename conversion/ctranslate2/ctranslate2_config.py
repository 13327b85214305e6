"""The config of an OPT in CTranslate2's folder, which has no sizes in its config.json: they come from `model.bin`.

Settings are variables without axes, sizes are axes, and the switches that CTranslate2 does not store follow from the
variables that are there. Special tokens are in config.json, their ids in vocabulary.json. A setting that would change
what OPT computes is refused.
Sources: `TransformerDecoderSpec` and `OPTLoader` of CTranslate2 4.8.
"""

import json
import re
from pathlib import Path
from typing import Any

from conversion.ctranslate2.ctranslate2_file import CTranslate2File
from opt_core.config import CONFIG_NAME, LAYER_NORM_EPS, OPTConfig
from opt_core.errors import ConfigError, raise_if
from opt_core.json_file import MAX_JSON_BYTES, read_json_object

VOCABULARY_NAME = "vocabulary.json"

_ACTIVATIONS = {0: "relu", 1: "gelu_new", 2: "silu", 3: "gelu"}
_OFF = ("scale_embeddings", "alibi", "start_from_zero_embedding")  # settings that OPT does not have
_NEEDED = ("num_heads", "pre_norm", "activation")
_INERT = ("alibi_use_positive_positions", "scale_alibi", "alignment_layer", "alignment_heads")  # nothing without alibi
_LAYER = re.compile(r"decoder/layer_(0|[1-9][0-9]{0,5})/")

# Field -> variable, and which of its axes has that length.
_AXES = {
    "vocab_size": ("decoder/embeddings/weight", 0),
    "word_embed_proj_dim": ("decoder/embeddings/weight", 1),
    "max_position_embeddings": ("decoder/position_encodings/encodings", 0),
    "hidden_size": ("decoder/position_encodings/encodings", 1),
    "ffn_dim": ("decoder/layer_0/ffn/linear_0/weight", 0),
}


def config_of(file: CTranslate2File, folder: Path) -> OPTConfig:
    """The config of the model in `file`; `folder` holds config.json and vocabulary.json, if any.

    Raises:
        ConfigError: lists the settings and variables that are missing or that no OPT has.
    """
    settings = {name.removeprefix("decoder/"): value for name, value in file.scalars.items()}  # revision 1: no prefix
    source, wanted = str(file.path), {name for name, _ in _AXES.values()}
    problems = [*_setting_problems(settings), *_epsilon_problems(folder)]
    problems += _layer_problems(file)
    problems += [f"{name}: missing" for name in sorted(wanted - file.tensors.keys())]
    problems += [
        f"{name}: expected two axes, got {file.tensors[name].shape}"
        for name in sorted(wanted & file.tensors.keys())
        if len(file.tensors[name].shape) != 2
    ]
    raise_if(ConfigError, source, problems)
    sizes = {field: file.tensors[name].shape[axis] for field, (name, axis) in _AXES.items()}
    fields = {**sizes, **_switches(file, settings), **_token_ids(folder, sizes["vocab_size"])}
    try:
        return OPTConfig(**fields)
    except ConfigError as error:
        raise ConfigError(source, error.problems) from None


def _layers(file: CTranslate2File) -> set[int]:
    return {int(match[1]) for name in file.tensors if (match := _LAYER.match(name))}


def _layer_problems(file: CTranslate2File) -> list[str]:
    layers = _layers(file)
    if layers == set(range(len(layers))):
        return []
    return [f"layers: expected 0 to {len(layers) - 1}, one after the other, got one numbered {max(layers)}"]


def _setting_problems(settings: dict[str, int | float]) -> list[str]:
    known = {*_OFF, *_NEEDED, *_INERT}
    problems = [f"{name}: missing among the settings" for name in _NEEDED if name not in settings]
    problems += [f"{name}: not a setting of OPT" for name in settings if name not in known]
    problems += [f"{name}: OPT has 0, got {settings[name]}" for name in _OFF if settings.get(name, 0) != 0]
    if settings.get("activation", 0) not in _ACTIVATIONS:
        words = ", ".join(f"{code} ({name})" for code, name in _ACTIVATIONS.items())
        problems.append(f"activation: expected one of {words}, got {settings['activation']}")
    return problems


def _epsilon_problems(folder: Path) -> list[str]:
    epsilon = _fields(folder).get("layer_norm_epsilon")
    if epsilon in (None, LAYER_NORM_EPS):
        return []
    return [f"{CONFIG_NAME}: layer_norm_epsilon: OPT has {LAYER_NORM_EPS}, got {str(epsilon)[:100]}"]


def _fields(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    return read_json_object(path) if path.is_file() else {}


def _switches(file: CTranslate2File, settings: dict[str, Any]) -> dict[str, Any]:
    tensors, pre_norm = file.tensors, settings["pre_norm"] != 0
    return {
        "num_hidden_layers": len(_layers(file)),
        "num_attention_heads": settings["num_heads"],
        "activation_function": _ACTIVATIONS[settings["activation"]],
        "do_layer_norm_before": pre_norm,
        "_remove_final_layer_norm": pre_norm and "decoder/layer_norm/gamma" not in tensors,
        "enable_bias": any(name.endswith("/bias") for name in tensors),
        "tie_word_embeddings": tensors.get("decoder/projection/weight") == tensors["decoder/embeddings/weight"],
    }


def _token_ids(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The ids of the special tokens, where the folder has a vocabulary."""
    tokens = _read_vocabulary(folder / VOCABULARY_NAME)
    if tokens is None:
        return {}
    if len(tokens) != vocab_size:
        problem = f"expected {vocab_size} tokens, as many as the embedding has rows, got {len(tokens)}"
        raise ConfigError(str(folder / VOCABULARY_NAME), [problem])
    ids = {token: number for number, token in enumerate(tokens)}
    fields = _fields(folder)
    names = {"bos_token_id": fields.get("bos_token"), "eos_token_id": fields.get("eos_token"), "pad_token_id": "<pad>"}
    return {field: ids.get(token) if isinstance(token, str) else None for field, token in names.items()}


def _read_vocabulary(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ConfigError(str(path), [f"expected at most {MAX_JSON_BYTES} bytes of JSON, got {path.stat().st_size}"])
    try:
        tokens = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), [f"not valid JSON: {error}"]) from None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ConfigError(str(path), ["expected a list of tokens"])
    return tokens
