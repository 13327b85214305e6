"""metaseq's settings and the config say the same, either way; what is no OPT, or is not told, is refused by name."""

import dataclasses
from argparse import Namespace

import metaseq_files as files
import pytest
import torch

from conversion.metaseq import metaseq_checkpoint as metaseq
from conversion.metaseq.metaseq_config import FIXED, SETTINGS, cfg_of, config_of_settings, settings_of
from opt_core import OPTConfig
from opt_core.errors import CheckpointError, ConfigError

VARIANTS = {
    "pre-norm": {},
    "no biases": dict(enable_bias=False),
    "plain norms": dict(layer_norm_elementwise_affine=False),
    "untied": dict(tie_word_embeddings=False),
    "projections": dict(word_embed_proj_dim=13),
    "350m": dict(word_embed_proj_dim=13, do_layer_norm_before=False),
    "dropout": dict(dropout=0.3, attention_dropout=0.2),
}


def shapes_of(config: OPTConfig, parts: int = 1) -> dict[str, tuple[int, ...]]:
    named = files.parts_of(files.truth_of(config), config, parts)[0]
    return {name: tuple(tensor.shape) for name, tensor in named.items()}


def read(settings, config: OPTConfig | None = None, parts: int = 1) -> OPTConfig:
    return config_of_settings(settings, shapes_of(config or files.config_of(parts), parts), parts, "x.pt")


def settings(**more) -> dict:
    return {name: value for name, value in vars(files.namespace_of(files.config_of(), **more)).items() if value != ""}


def refusal(given, **sizes) -> str:
    with pytest.raises(CheckpointError) as raised:
        config_of_settings(given, shapes_of(files.config_of()), 1, "x.pt", **sizes)
    return str(raised.value)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_comes_back_from_its_settings(variant, parts):
    if variant == "350m":
        parts = 1
    config = files.config_of(parts, **VARIANTS[variant])
    written = cfg_of(config, parts)
    assert read(settings_of({**written, "model": vars(written["model"])}, None), config, parts) == config


def test_every_setting_says_a_field_and_no_field_is_said_in_two_ways():
    fields = {field.name for field in dataclasses.fields(OPTConfig)}
    assert {setting.field for setting in SETTINGS} <= fields
    assert len({setting.name for setting in SETTINGS} | FIXED.keys()) == len(SETTINGS) + len(FIXED)
    for setting in SETTINGS:
        if setting.kind is bool:
            assert setting.of(setting.of(True)) is True


@pytest.mark.parametrize(
    "name", ["decoder_embed_dim", "decoder_layers", "decoder_attention_heads", "decoder_ffn_embed_dim"]
)
def test_a_size_that_is_missing_is_named_with_what_to_do(name):
    given = settings()
    del given[name]
    assert f"cfg.model.{name}: missing" in refusal(given)
    assert "give a config" in refusal(given)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (dict(decoder_layers=4), "cfg.model.decoder_layers: 4, but the tensors have 3"),
        (dict(decoder_embed_dim=72), "cfg.model.decoder_embed_dim: 72, but the tensors have 66"),
        (dict(decoder_ffn_embed_dim=34), "cfg.model.decoder_ffn_embed_dim: 34, but the tensors have 17"),
        (dict(decoder_layers="3"), "cfg.model.decoder_layers: expected int, got '3'"),
        (dict(decoder_layers=True), "cfg.model.decoder_layers: expected int, got True"),
        (dict(dropout=[0.1]), "cfg.model.dropout: expected float, got (0.1,)"),
        (dict(decoder_normalize_before="no"), "cfg.model.decoder_normalize_before: expected bool"),
        (dict(activation_fn="gelu"), "give a config with activation_function gelu (erf) or gelu_new (tanh)"),
        (dict(activation_fn="swiglu"), "expected relu, got 'swiglu'"),
        (dict(alibi=True), "cfg.model.alibi: OPT has False, got True"),
        (dict(decoder_learned_sinusoidal=True), "decoder_learned_sinusoidal"),
        (dict(decoder_learned_pos=False), "cfg.model.decoder_learned_pos: OPT has True, got False"),
        (dict(no_scale_embedding=False), "cfg.model.no_scale_embedding: OPT has True, got False"),
        (dict(scale_fc=True), "scale_fc"),
        (dict(scale_attn=True), "scale_attn"),
        (dict(scale_heads=True), "scale_heads"),
        (dict(use_stable_embedding=True), "use_stable_embedding"),
    ],
)
def test_settings_of_another_model_are_refused_by_name(more, problem):
    assert problem in refusal(settings(**more))


def test_all_problems_are_listed_at_once():
    message = refusal(settings(alibi=True, scale_fc=True, decoder_layers=None, activation_fn="gelu"))
    assert "x.pt: 3 problems" in message  # None is no value, and 3 layers are stored


def test_a_size_that_makes_no_model_is_a_config_error():
    with pytest.raises(ConfigError, match="multiple of num_attention_heads"):
        read(settings(decoder_attention_heads=7))


def test_settings_that_say_nothing_about_the_computation_are_ignored():
    more = dict(self_attn_doc_sep=2, sequence_parallel=True, model_parallel_size=8, attn_variant="default")
    assert read(settings(**more, fsdp_checkpoint_wrap_layer_frequency=4)) == read(settings())


def test_what_tensors_say_is_not_asked_of_settings():
    more = dict(decoder_input_dim=512, tokens_per_sample=2048, max_target_positions="${task.tokens_per_sample}")
    config = read(settings_of({"model": settings(**more)}, None))
    assert (config.word_embed_proj_dim, config.max_position_embeddings, config.vocab_size) == (66, 37, 56)


def test_norms_are_where_the_classes_put_them():
    def placed(without_final_norm, **more) -> tuple[bool, bool]:
        shapes = shapes_of(files.config_of())
        if without_final_norm:
            shapes = {name: shape for name, shape in shapes.items() if "decoder.layer_norm" not in name}
        config = config_of_settings(settings(**more), shapes, 1, "x.pt")
        return config.do_layer_norm_before, config._remove_final_layer_norm

    apart = dict(arch="transformer_lm", _name="transformer_lm")
    assert placed(False, decoder_normalize_before=True) == (True, False)
    assert placed(True, decoder_normalize_before=True) == (True, True)
    assert placed(True, decoder_normalize_before=False, **apart) == (False, False)
    assert placed(False, decoder_normalize_before=False, **apart) == (True, False)
    assert placed(True, decoder_normalize_before=False) == (True, True)  # which the model-parallel classes overrule


def test_values_of_the_task_complete_those_of_the_model():
    cfg = {"task": {"tokens_per_sample": 37, "dropout": 0.5}, "model": settings(tokens_per_sample=None)}
    found = settings_of(cfg, None)
    assert found["tokens_per_sample"] == 37
    assert found["dropout"] == 0.1
    assert settings_of({"task": {}}, None) is None
    assert settings_of(None, None) is None


@pytest.mark.parametrize(
    ("more", "parts", "problem"),
    [
        (dict(activation_function="gelu"), 1, "activation_function: expected relu"),
        (dict(_remove_final_layer_norm=True), 1, "_remove_final_layer_norm: expected False"),
        (dict(do_layer_norm_before=False), 2, "do_layer_norm_before: expected True for several parts"),
        (dict(vocab_size=57), 2, "vocab_size: expected a multiple of 2 parts, got 57"),
        ({}, 4, "num_attention_heads: expected a multiple of 4 parts, got 6"),
        (dict(ffn_dim=17), 3, "ffn_dim: expected a multiple of 3 parts, got 17"),
    ],
)
def test_what_metaseq_has_no_model_for_is_not_written(more, parts, problem):
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        cfg_of(files.config_of(parts, **more), parts)


def test_what_is_written_are_plain_settings():
    cfg = cfg_of(files.config_of())
    assert isinstance(cfg["model"], Namespace)
    for value in [*vars(cfg["model"]).values(), *cfg["common"].values(), *cfg["task"].values()]:
        assert isinstance(value, (bool, int, float, str))


def test_a_checkpoint_of_another_model_is_refused_when_its_config_is_asked_for(tmp_path):
    config = files.config_of()
    (named,) = files.parts_of(files.truth_of(config), config, 1)
    torch.save({"cfg": files.cfg_of(config, alibi=True), "model": named}, tmp_path / "reshard.pt")
    with pytest.raises(CheckpointError, match=r"cfg\.model\.alibi"):
        metaseq.config_of(metaseq.open_parts(tmp_path))
