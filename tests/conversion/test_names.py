"""Names as met in the wild all lead to the schema's, and what is not OPT is refused with a guess at what it is."""

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import assert_holds, config_of, tensors_of

from conversion import open_checkpoint
from conversion.names import canonical_name, canonical_names
from opt_core.errors import CheckpointError
from opt_core.schema import TASKS, published_name, shapes

PREFIXES = {
    "model.decoder.": "causal-lm",
    "decoder.": "base",
    "": "base",
    "module.model.decoder.": "causal-lm",
    "module.decoder.": "base",
    "module.": "base",
    "_orig_mod.model.decoder.": "causal-lm",
    "_orig_mod.module.": "base",
    "module._orig_mod.model.decoder.": "causal-lm",
    "model.decoder._orig_mod.": "causal-lm",
    "model._fsdp_wrapped_module.decoder.": "causal-lm",
}


def save(folder, config, stored):
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in stored.items()}, folder / "model.safetensors"
    )
    config.to_json(folder)
    return folder


def renamed(tensors, prefix):
    return {prefix + name.removeprefix("decoder."): array for name, array in tensors.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", ["pre-norm", "350m-style"])
def test_every_prefix_is_understood(tmp_path, prefix, variant):
    config = config_of(variant)
    tensors = tensors_of(config)
    with open_checkpoint(save(tmp_path, config, renamed(tensors, prefix))) as checkpoint:
        checkpoint.check()
        assert checkpoint.task == PREFIXES[prefix]
        assert_holds(checkpoint, tensors)


@pytest.mark.parametrize("task", TASKS)
def test_canonical_undoes_published(task):
    for name in shapes(config_of("untied", word_embed_proj_dim=13), task):
        assert canonical_name(published_name(name, task)) == name
        assert canonical_name(name) == name


def test_a_compiled_layer_inside_the_name_is_unwrapped():
    assert canonical_name("model.decoder.layers.1._orig_mod.fc1.bias") == "decoder.layers.1.fc1.bias"


@pytest.mark.parametrize("prefix", ["decoder.", "model.decoder.", ""])
def test_the_older_name_of_the_final_norm_is_understood(tmp_path, prefix):
    config = config_of()
    tensors = tensors_of(config)
    stored = renamed(tensors, prefix)
    for word in ("weight", "bias"):
        stored[f"{prefix}layer_norm.{word}"] = stored.pop(f"{prefix}final_layer_norm.{word}")
    with open_checkpoint(save(tmp_path, config, stored)) as checkpoint:
        assert_holds(checkpoint, tensors)


def test_a_tied_head_is_dropped_when_it_equals_the_embedding_and_says_nothing_about_the_task(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    head = {"lm_head.weight": tensors["decoder.embed_tokens.weight"]}
    with open_checkpoint(save(tmp_path, config, {**tensors, **head})) as checkpoint:
        checkpoint.check()
        assert checkpoint.task == "base"
        assert_holds(checkpoint, tensors)


def test_a_tied_head_that_differs_in_one_bit_is_refused_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.assembly._COMPARED_BYTES", 1000)  # the last of several pieces differs
    config = config_of()
    tensors = tensors_of(config)
    head = tensors["decoder.embed_tokens.weight"].copy()
    head.view(np.uint32)[-1, -1] ^= 1
    save(tmp_path, config, {**tensors, "lm_head.weight": head})
    with pytest.raises(CheckpointError, match="tie_word_embeddings=false"):
        open_checkpoint(tmp_path)
    with open_checkpoint(tmp_path, config=config.replace(tie_word_embeddings=False)) as checkpoint:
        assert checkpoint.task == "causal-lm"
        assert_holds(checkpoint, {**tensors, "lm_head.weight": head})


def test_an_embedding_stored_only_under_the_name_of_the_tied_head_is_found(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    stored = {**tensors, "lm_head.weight": tensors["decoder.embed_tokens.weight"]}
    del stored["decoder.embed_tokens.weight"]
    with open_checkpoint(save(tmp_path, config, stored)) as checkpoint:
        assert_holds(checkpoint, tensors)


FOREIGN = {
    "model.decoder.layers.0.fc1.qweight": "quantised",
    "model.decoder.layers.0.fc1.weight.absmax": "quantised",
    "model.decoder.layers.0.fc1.SCB": "quantised",
    "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight": "LoRA",
    "decoder.layers.0.self_attn.qkv_proj.weight": "metaseq",
    "flat_param_0": "metaseq",
    "decoder.version": "metaseq",
    "model/decoder/embed_tokens/weight:0": "TensorFlow",
    "model.decoder.layers.0.fc1.kernel": "Flax",
    "language_model.model.decoder.layers.0.fc1.weight": "contains OPT",
    "transformer.h.0.attn.c_attn.weight": "not a weight of OPT",
    "decoder.layers.00.fc1.weight": "not a weight of OPT",
    "decoder.layers.-1.fc1.weight": "not a weight of OPT",
    "../../decoder.embed_tokens.weight": "not a weight of OPT",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_name_is_refused_with_what_it_looks_like(tmp_path, name):
    config = config_of()
    save(tmp_path, config, {**tensors_of(config), name: np.ones(3, np.float32)})
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(tmp_path)
    assert name in str(raised.value)
    assert FOREIGN[name] in str(raised.value)


def test_one_weight_under_two_names_is_refused():
    _, problems = canonical_names(["decoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"])
    assert len(problems) == 1
    assert "stored twice" in problems[0]


@pytest.mark.parametrize(
    ("stored", "asked", "hint"),
    [
        ("no-bias", "pre-norm", "enable_bias=false"),
        ("pre-norm", "no-bias", "enable_bias=true"),
        ("non-affine", "pre-norm", "layer_norm_elementwise_affine=false"),
        ("no-final-norm", "pre-norm", "_remove_final_layer_norm=true"),
    ],
)
def test_the_switch_that_explains_all_differences_is_named(tmp_path, stored, asked, hint):
    save(tmp_path, config_of(stored), tensors_of(config_of(stored)))
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=hint):
        checkpoint.check(config_of(asked))


def test_a_check_lists_missing_unexpected_and_mis_shaped_tensors_together(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    del tensors["decoder.layers.1.fc1.weight"]
    tensors["decoder.layers.3.fc1.bias"] = np.ones(31, np.float32)
    tensors["decoder.layers.2.fc2.weight"] = tensors["decoder.layers.2.fc2.weight"].T
    with open_checkpoint(save(tmp_path, config, tensors)) as checkpoint, pytest.raises(CheckpointError) as raised:
        checkpoint.check()
    assert len(raised.value.problems) == 3
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError) as raised:
        checkpoint.check(may_lack=["decoder.layers.1.fc1.weight"], may_have=["decoder.layers.3.fc1.bias"])
    assert [p.split(":")[0] for p in raised.value.problems] == ["decoder.layers.2.fc2.weight"]
