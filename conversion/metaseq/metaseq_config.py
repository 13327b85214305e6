"""The settings that metaseq stores beside its weights, and the config that they amount to: one table, read both ways.

The settings are those of the model's section (`cfg["model"]`), or `args` in old files. Sources: metaseq f2cd367 (May
2022) and f7ffa5f (June 2023), `models/transformer_lm.py`, `model_parallel/models/transformer_lm.py`,
`checkpoint_utils.py`.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from conversion.metaseq.metaseq_parts import EMBEDDING
from conversion.pytorch.torch_pickle import outline
from opt_core.config import POSITION_OFFSET, OPTConfig
from opt_core.errors import CheckpointError, ConfigError, raise_if

_POSITIONS = "decoder.embed_positions.weight"
_FINAL_NORM = "decoder.layer_norm.weight"
# Settings `arch` of the classes that join keys, values and queries, and of those that keep them apart.
JOINT, APART = "transformer_lm_megatron", "transformer_lm"
_REQUIRED = object()


class Setting(NamedTuple):
    """One of metaseq's settings, and the field of `OPTConfig` that says the same."""

    name: str
    field: str
    kind: type
    default: Any = _REQUIRED  # where it is absent, as in files from before it existed
    is_negated: bool = False

    def of(self, value):
        """From the one to the other, either way."""
        return not value if self.is_negated else value


SETTINGS = (
    Setting("decoder_embed_dim", "hidden_size", int),
    Setting("decoder_layers", "num_hidden_layers", int),
    Setting("decoder_attention_heads", "num_attention_heads", int),
    Setting("decoder_ffn_embed_dim", "ffn_dim", int),
    Setting("decoder_input_dim", "word_embed_proj_dim", int, None),
    Setting("decoder_output_dim", "word_embed_proj_dim", int, None),
    Setting("max_target_positions", "max_position_embeddings", int, None),
    Setting("tokens_per_sample", "max_position_embeddings", int, None),
    Setting("activation_fn", "activation_function", str, "relu"),
    Setting("decoder_normalize_before", "do_layer_norm_before", bool, True),
    Setting("disable_bias", "enable_bias", bool, False, is_negated=True),
    Setting("disable_affine_ln", "layer_norm_elementwise_affine", bool, False, is_negated=True),
    Setting("share_decoder_input_output_embed", "tie_word_embeddings", bool, True),
    Setting("dropout", "dropout", float, 0.1),
    Setting("attention_dropout", "attention_dropout", float, 0.0),
)
# Settings of models that are no OPT: only this value is read, and this value is written.
FIXED = {
    "decoder_learned_pos": True,
    "decoder_learned_sinusoidal": False,
    "no_scale_embedding": True,
    "alibi": False,
    "use_stable_embedding": False,
    "scale_fc": False,
    "scale_attn": False,
    "scale_heads": False,
}


def settings_of(cfg: Mapping[str, Any] | None, args: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The settings of the model, completed by those of the task; None where there are none.

    Those without a value, or with a reference to another ("${...}") for it, are left out.
    """
    sections = [cfg.get(name) for name in ("task", "model")] if isinstance(cfg, dict) else [args]
    if not isinstance(sections[-1], dict):
        return None
    given = {name: value for section in sections if isinstance(section, dict) for name, value in section.items()
             if value is not None and not (isinstance(value, str) and value.startswith("${"))}  # fmt: skip
    return given


def is_model_parallel(settings: Mapping[str, Any] | None, parts: int) -> bool | None:
    """True for a model of the model-parallel classes, False for one of the others, None where nothing tells."""
    if parts > 1:
        return True
    arch = (settings or {}).get("arch", (settings or {}).get("_name"))
    return "megatron" in arch or "model_parallel" in arch if isinstance(arch, str) else None


# -- reading ----------------------------------------------------------------------------------------------------------


def config_of_settings(
    settings: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]], parts: int, source: str, **sizes
) -> OPTConfig:
    """The config of a checkpoint, from its settings and the shapes of one of its equal parts.

    Without shapes, of a flat file, `sizes` gives the vocabulary, and a final norm is taken to be where norms come
    first.

    Raises:
        CheckpointError: settings are missing, contradict the tensors, or are of a model that is no OPT.
        ConfigError: the sizes are of no model.
    """
    if settings is None:
        text = "cfg: missing, and with it the number of heads, which no tensor tells: give a config"
        raise CheckpointError(source, [text])
    problems = list(_setting_problems(settings))
    raise_if(CheckpointError, source, problems)
    fields = {setting.field: setting.of(value) for setting, value in _given(settings)}
    fields |= _switches(fields, settings, shapes, parts)
    if shapes:
        fields |= _sizes_of(shapes, parts, source)
        problems = list(_size_problems(fields, shapes, parts))
    elif "max_position_embeddings" not in fields:
        problems = ["cfg.model.max_target_positions: missing, and no tensor tells it: give a config"]
    raise_if(CheckpointError, source, problems)
    try:
        return OPTConfig(**{**fields, **sizes})
    except ConfigError as error:
        raise ConfigError(source, error.problems) from None


def _given(settings: Mapping[str, Any]) -> Iterator[tuple[Setting, Any]]:
    """Of two settings for one field the first counts."""
    seen: set[str] = set()
    for setting in SETTINGS:
        value = settings.get(setting.name, setting.default)
        if setting.field not in seen and value is not None:
            seen.add(setting.field)
            yield setting, float(value) if setting.kind is float else value


def _setting_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    for setting in SETTINGS:
        value = settings.get(setting.name, setting.default)
        if value is _REQUIRED:
            yield f"cfg.model.{setting.name}: missing, expected the {setting.field}: give a config"
        elif value is not None and not _is(value, setting.kind):
            yield f"cfg.model.{setting.name}: expected {setting.kind.__name__}, got {_text(value)}"
    for name, only in FIXED.items():
        if name in settings and settings[name] != only:
            yield f"cfg.model.{name}: OPT has {only}, got {_text(settings[name])}, which this code does not compute"
    activation = settings.get("activation_fn", "relu")
    if activation == "gelu":
        yield (
            "cfg.model.activation_fn: gelu is the erf form in metaseq's first versions and the tanh form in later ones:"
            " give a config with activation_function gelu (erf) or gelu_new (tanh)"
        )
    elif isinstance(activation, str) and activation != "relu":
        yield f"cfg.model.activation_fn: expected relu, got {_text(activation)}: give a config if OPT has the same"


def _is(value, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _text(value) -> str:
    return repr(value[:100]) if isinstance(value, str) else outline(value)


def _switches(fields: dict, settings: Mapping[str, Any], shapes: Mapping[str, tuple], parts: int) -> dict[str, bool]:
    """Where the norms are. The model-parallel classes put them before, whatever the setting says."""
    has_final_norm = not shapes or _FINAL_NORM in shapes
    before = fields["do_layer_norm_before"] or bool(is_model_parallel(settings, parts)) or (
        bool(shapes) and has_final_norm
    )  # fmt: skip
    is_affine = fields["layer_norm_elementwise_affine"]  # or else a norm leaves no trace
    return dict(do_layer_norm_before=before, _remove_final_layer_norm=before and is_affine and not has_final_norm)


def _sizes_of(shapes: Mapping[str, tuple[int, ...]], parts: int, source: str) -> dict[str, int]:
    """What the tensors say better: nothing obeys the setting `decoder_input_dim` in models without projections."""
    problems = [f"{name}: expected a matrix, got {shapes.get(name, 'none')}" for name in (EMBEDDING, _POSITIONS)
                if len(shapes.get(name, ())) != 2]  # fmt: skip
    raise_if(CheckpointError, source, problems)
    return dict(
        vocab_size=shapes[EMBEDDING][0] * parts,
        word_embed_proj_dim=shapes[EMBEDDING][1],
        max_position_embeddings=shapes[_POSITIONS][0] - POSITION_OFFSET,
    )


def _size_problems(fields: dict, shapes: Mapping[str, tuple[int, ...]], parts: int) -> Iterator[str]:
    layers = {int(name.split(".")[2]) for name in shapes if name.startswith("decoder.layers.")}
    stored = {"decoder_embed_dim": shapes[_POSITIONS][1], "decoder_layers": len(layers)}
    inner = shapes.get("decoder.layers.0.fc1.weight")
    if inner and stored["decoder_layers"]:
        stored["decoder_ffn_embed_dim"] = inner[0] * parts
    for setting in SETTINGS:
        if setting.name in stored and fields[setting.field] != stored[setting.name]:
            yield f"cfg.model.{setting.name}: {fields[setting.field]}, but the tensors have {stored[setting.name]}"


# -- writing ----------------------------------------------------------------------------------------------------------


def cfg_of(config: OPTConfig, parts: int = 1) -> dict[str, Any]:
    """The inverse: the `cfg` of a checkpoint of `parts` model-parallel parts, as far as building the model needs it.

    Raises:
        ConfigError: lists what metaseq has no model for.
    """
    raise_if(ConfigError, "metaseq", list(_unwritable(config, parts)))
    arch = JOINT if config.do_layer_norm_before else APART
    settings = {setting.name: setting.of(getattr(config, setting.field)) for setting in SETTINGS}
    length = config.max_position_embeddings
    return {
        "common": {"model_parallel_size": parts},
        "task": {"_name": "streaming_language_modeling", "tokens_per_sample": length, "max_target_positions": length},
        "model": Namespace(_name=arch, arch=arch, model_parallel_size=parts, **settings, **FIXED),
    }


def _unwritable(config: OPTConfig, parts: int) -> Iterator[str]:
    if config.activation_function != "relu":
        yield f"activation_function: expected relu, got {config.activation_function!r}: metaseq's gelu changed its form"
    if config._remove_final_layer_norm:
        yield "_remove_final_layer_norm: expected False: metaseq's models with norms before have a final one"
    if parts > 1 and not config.do_layer_norm_before:
        yield "do_layer_norm_before: expected True for several parts: metaseq's model-parallel layers put norms before"
    for field in ("vocab_size", "num_attention_heads", "ffn_dim"):
        if getattr(config, field) % parts:
            yield f"{field}: expected a multiple of {parts} parts, got {getattr(config, field)}"
