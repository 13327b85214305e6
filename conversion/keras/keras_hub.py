"""KerasHub's presets without their weights: the config both ways, and the other files of the folder.

A preset has config.json (a serialized `OPTBackbone`), its weights (`keras_hub_weights`), and, for text, task.json,
preprocessor.json, tokenizer.json and the vocabulary. Which variants of OPT the class can be is the business of the
table of formats. Nothing of KerasHub's tokenizer is taken over: its files are written, not used.
Sources: `keras_hub.src.models.opt` and `keras_hub.src.utils.preset_utils` of KerasHub 0.32.
"""

import json
from pathlib import Path
from typing import Any

from conversion.keras import keras_h5
from opt_core.config import CONFIG_NAME, POSITION_OFFSET, OPTConfig
from opt_core.errors import CheckpointError, ConfigError, raise_if
from opt_core.json_file import read_json_object
from opt_core.schema import parameter_count

VOCABULARY_NAME = "assets/tokenizer/vocabulary.json"
MERGES_NAME = "assets/tokenizer/merges.txt"

# Argument of OPTBackbone -> field of OPTConfig. It has one rate for both dropouts: the first row is written.
FIELDS = (
    ("vocabulary_size", "vocab_size"),
    ("num_layers", "num_hidden_layers"),
    ("num_heads", "num_attention_heads"),
    ("hidden_dim", "hidden_size"),
    ("intermediate_dim", "ffn_dim"),
    ("dropout", "dropout"),
    ("dropout", "attention_dropout"),
    ("max_sequence_length", "max_position_embeddings"),
)
_DEFAULTS = {"dropout": 0.1, "max_sequence_length": 2048}
_INERT_ARGUMENTS = {"name", "trainable", "dtype"}
_TOKENS = {"pad_token_id": "<pad>", "bos_token_id": "</s>", "eos_token_id": "</s>"}  # as OPTTokenizer has them
_CLASSES = ("OPTBackbone", "OPTCausalLM")
_FLOAT_POLICIES = ("float32", "float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16")
_LONGEST_PROMPT = 1024  # the default of KerasHub's preprocessors


# -- config.json ------------------------------------------------------------------------------------------------------


def config_of(source: Path) -> OPTConfig:
    """The config of a preset folder, of the preset that a weight file lies in, or of a `.keras` archive.

    Raises:
        ConfigError: it is no OPT, or has arguments that OPTBackbone does not have.
        CheckpointError: there is no config.json, or the archive is damaged.
    """
    if source.is_file() and keras_h5.is_archive(source):
        return _config_from(keras_h5.read_config(source), f"{source}: {CONFIG_NAME}", {})
    folder = source if source.is_dir() else source.parent
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(str(folder), [f"{CONFIG_NAME}: missing; put it beside the weights, or give a config"])
    return _config_from(read_json_object(path), str(path), _token_ids(folder / VOCABULARY_NAME))


def _token_ids(vocabulary: Path) -> dict[str, Any]:
    """The special tokens' ids, where the preset has a vocabulary that has them."""
    ids = read_json_object(vocabulary) if vocabulary.is_file() else {}
    return {field: ids[token] for field, token in _TOKENS.items() if token in ids}


def _config_from(fields: dict[str, Any], source: str, token_ids: dict[str, Any]) -> OPTConfig:
    arguments = _arguments_in(fields, source)
    known = {argument for argument, _ in FIELDS}
    problems = [f"{name}: not an argument of OPTBackbone" for name in arguments if name not in known | _INERT_ARGUMENTS]
    problems += [f"{name}: missing" for name in sorted(known - arguments.keys() - _DEFAULTS.keys())]
    policy = _policy_name(arguments.get("dtype"))
    if policy not in (None, *_FLOAT_POLICIES):
        problems.append(f"dtype: expected one of {', '.join(_FLOAT_POLICIES)}, got {policy}: quantised weights")
    raise_if(ConfigError, source, problems)
    values = {**_DEFAULTS, **arguments}
    try:
        return OPTConfig(**{field: values[argument] for argument, field in FIELDS}, **token_ids)
    except ConfigError as error:
        raise ConfigError(source, error.problems) from None


def _arguments_in(fields: dict[str, Any], source: str) -> dict[str, Any]:
    """The arguments of the OPTBackbone in a serialized object, or in the backbone of a serialized task."""
    name, arguments = str(fields.get("class_name")).rpartition(">")[2], fields.get("config")
    if name not in _CLASSES or not isinstance(arguments, dict):
        raise ConfigError(source, [f"class_name: expected OPTBackbone of KerasHub, got {name[:100]}"])
    if name == "OPTCausalLM":
        backbone = arguments.get("backbone")
        return _arguments_in(backbone if isinstance(backbone, dict) else {}, source)
    return arguments


def _policy_name(dtype) -> str | None:
    """The name in a serialized policy, or what older files have in its place; of a map of policies its class."""
    if isinstance(dtype, dict):
        settings = dtype.get("config")
        dtype = settings["name"] if isinstance(settings, dict) and "name" in settings else dtype.get("class_name", "")
    return None if dtype is None else str(dtype)[:100]


# -- the files beside the weights -------------------------------------------------------------------------------------


def preset_files(
    config: OPTConfig, dtype: str, *, task: str = "causal-lm", tokenizer_folder: Path | None = None
) -> dict[str, bytes]:
    """What a preset has beside its weights: file name (with folders) to content.

    Args:
        dtype: of the weights.
        task: "causal-lm" adds task.json, without which `OPTCausalLM.from_preset` asks for a tokenizer.
        tokenizer_folder: holds vocab.json and merges.txt, which are copied in KerasHub's form; else the preset has no
            tokenizer, and its models take token ids.

    Raises:
        CheckpointError: the vocabulary lacks a token that KerasHub's tokenizer must have.
    """
    backbone = _backbone(config, dtype)
    files = {CONFIG_NAME: _text(backbone), "metadata.json": _text(_metadata(config))}
    preprocessor = None
    if tokenizer_folder is not None:
        preprocessor = _preprocessor(config, dtype)
        files |= {"tokenizer.json": _text(_TOKENIZER), "preprocessor.json": _text(preprocessor)}
        files |= _tokenizer_assets(tokenizer_folder)
    if task == "causal-lm":
        arguments = {"backbone": backbone, "preprocessor": preprocessor, "name": "opt_causal_lm"}
        files["task.json"] = _text(_serialized("opt_causal_lm", "OPTCausalLM", arguments))
    return {name: text.encode() for name, text in files.items()}


def _backbone(config: OPTConfig, dtype: str) -> dict[str, Any]:
    arguments = _layer("opt_backbone", dtype)
    for argument, field in FIELDS:
        arguments.setdefault(argument, getattr(config, field))
    return _serialized("opt_backbone", "OPTBackbone", arguments)


def _metadata(config: OPTConfig) -> dict[str, Any]:
    rows_left_out = POSITION_OFFSET * config.hidden_size
    return {
        "keras_version": "3.15.1",  # the versions whose files these are like
        "keras_hub_version": "0.32.0",
        "parameter_count": parameter_count(config, "base") - rows_left_out,
        "tasks": ["CausalLM"],
    }


def _preprocessor(config: OPTConfig, dtype: str) -> dict[str, Any]:
    arguments = {
        **_layer("opt_causal_lm_preprocessor", dtype),
        "tokenizer": _TOKENIZER,
        "config_file": "preprocessor.json",
        "sequence_length": min(_LONGEST_PROMPT, config.max_position_embeddings),
        "add_start_token": True,
        "add_end_token": True,
    }
    return _serialized("opt_causal_lm_preprocessor", "OPTCausalLMPreprocessor", arguments)


def _serialized(module: str, class_name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "module": f"keras_hub.src.models.opt.{module}",
        "class_name": class_name,
        "config": arguments,
        "registered_name": f"keras_hub>{class_name}",
    }


def _layer(name: str, dtype: str) -> dict[str, Any]:
    policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": dtype}, "registered_name": None}
    return {"name": name, "trainable": True, "dtype": policy}


_TOKENIZER = _serialized(
    "opt_tokenizer",
    "OPTTokenizer",
    {
        **_layer("opt_tokenizer", "int32"),
        "config_file": "tokenizer.json",
        "sequence_length": None,
        "add_prefix_space": False,
        "unsplittable_tokens": ["</s>", "<pad>"],
    },
)


def _tokenizer_assets(folder: Path) -> dict[str, str]:
    from opt_core.tokenizer_files import bpe_files  # the tokenizers library takes its time

    found = bpe_files(folder)
    if found is None:
        raise CheckpointError(str(folder), ["expected vocab.json and merges.txt of a tokenizer, got not both"])
    vocabulary = read_json_object(found[0])
    missing = [token for token in ("</s>", "<pad>") if token not in vocabulary]
    problems = [f"{token}: missing in the vocabulary, KerasHub's tokenizer needs it" for token in missing]
    raise_if(CheckpointError, str(found[0]), problems)
    merges = found[1].read_text(encoding="utf-8")
    if merges.startswith("#version:"):
        merges = merges.partition("\n")[2]
    return {VOCABULARY_NAME: json.dumps(vocabulary), MERGES_NAME: merges}


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=4)
