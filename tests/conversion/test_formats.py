"""The table of formats: every weight has one place in each, and layouts invert; further formats need only a table."""

import numpy as np
import pytest
from checkpoints import VARIANTS, config_of, tensors_of

from conversion.formats import FORMATS, Format, Rule, layout_of, places, published_of
from conversion.layout import block, schema_shape, stored_shape, to_schema, to_stored
from conversion.names import canonical_name
from opt_core.schema import TASKS, published_name, shapes

# Formats of other programs in miniature, to show that the table can say what they need.
LIKE_FLAX = Format(
    "like flax", "flax_model", ".msgpack",
    (
        Rule("*.embed_*.weight", "{model}{0}.embed_{1}.embedding"),
        Rule("*norm.weight", "{model}{0}norm.scale"),
        Rule("*.bias", "{model}{0}.bias"),
        Rule("*.weight", "{model}{0}.kernel", dims="reversed"),
    ),
)  # fmt: skip
LIKE_KERAS_HUB = Format(
    "like keras_hub", "model.weights", ".h5",
    (
        Rule("decoder.embed_positions.weight", "position_embedding/vars/0", skip_rows=2),
        Rule("decoder.layers.{layer}.self_attn.out_proj.weight", "decoder_{layer}/output_dense/vars/0", dims="NHD"),
        Rule("decoder.layers.{layer}.self_attn.*_proj.weight", "decoder_{layer}/{0}_dense/vars/0", dims="DNH"),
        Rule("decoder.layers.{layer}.self_attn.out_proj.bias", "decoder_{layer}/output_dense/vars/1"),
        Rule("decoder.layers.{layer}.self_attn.*_proj.bias", "decoder_{layer}/{0}_dense/vars/1", dims="NH"),
        Rule("decoder.layers.{layer}.fc*.weight", "decoder_{layer}/fc{0}/vars/0", dims="reversed"),
        Rule("*", "{0}"),
    ),
)  # fmt: skip
LIKE_METASEQ = Format(
    "like metaseq", "reshard", ".pt",
    (
        *(
            Rule(f"decoder.layers.{{layer}}.self_attn.{letter}_proj.*", "decoder.layers.{layer}.self_attn.qkv_proj.{0}",
                 slot=(n, 3), split="A")
            for n, letter in enumerate("kvq")
        ),
        Rule("*", "{0}"),
    ),
)  # fmt: skip
ALL = [*FORMATS.values(), LIKE_FLAX, LIKE_KERAS_HUB, LIKE_METASEQ]


@pytest.mark.parametrize("format", ALL, ids=lambda format: format.name)
@pytest.mark.parametrize("variant", [*VARIANTS])
@pytest.mark.parametrize("task", TASKS)
def test_every_weight_has_one_place_and_every_layout_inverts(format, variant, task):
    config = config_of(variant, num_labels=5)
    where = places(format, config, task)
    tensors = tensors_of(config, task)
    assert where.keys() == shapes(config, task).keys()
    for name, place in where.items():
        stored = to_stored(tensors[name], place.layout)
        assert stored.shape == stored_shape(place.layout), name
        assert schema_shape(stored.shape, place.layout) == tensors[name].shape, name
        back = to_schema(stored, place.layout)
        skipped = place.layout.skip_rows
        assert np.array_equal(back[skipped:], tensors[name][skipped:]), name
        assert back.shape == tensors[name].shape, name
        assert not back[:skipped].any(), name


@pytest.mark.parametrize("format", [FORMATS["safetensors"], FORMATS["torch-bin"]], ids=lambda format: format.name)
@pytest.mark.parametrize("task", TASKS)
def test_the_published_layout_is_the_schemas_own(format, task):
    config = config_of("350m-style", num_labels=5)
    for name, place in places(format, config, task).items():
        assert place.name == published_name(name, task)
        assert place.layout.is_identity


def test_linear_weights_are_turned_by_kind_even_when_they_are_square():
    config = config_of()
    tensors = tensors_of(config)
    where = places(LIKE_FLAX, config, "causal-lm")
    name = "decoder.layers.1.self_attn.q_proj.weight"
    assert where[name].name == "model.decoder.layers.1.self_attn.q_proj.kernel"
    assert np.array_equal(to_stored(tensors[name], where[name].layout), tensors[name].T)
    assert where["decoder.layers.1.final_layer_norm.weight"].name == "model.decoder.layers.1.final_layer_norm.scale"
    assert where["decoder.embed_tokens.weight"].layout.is_identity


def test_joined_heads_are_split_as_the_reshape_of_the_transpose():
    config = config_of()
    tensors = tensors_of(config)
    where = places(LIKE_KERAS_HUB, config, "base")
    query, out = (f"decoder.layers.2.self_attn.{part}_proj.weight" for part in ("q", "out"))
    assert where[query].name == "decoder_2/q_dense/vars/0"
    assert np.array_equal(to_stored(tensors[query], where[query].layout), tensors[query].T.reshape(22, 2, 11))
    assert np.array_equal(to_stored(tensors[out], where[out].layout), tensors[out].T.reshape(2, 11, 22))
    positions = "decoder.embed_positions.weight"
    assert np.array_equal(to_stored(tensors[positions], where[positions].layout), tensors[positions][2:])


def test_fused_keys_values_and_queries_are_blocks_of_one_tensor():
    config = config_of()
    tensors = tensors_of(config)
    where = places(LIKE_METASEQ, config, "base")
    names = [f"decoder.layers.0.self_attn.{letter}_proj.weight" for letter in "kvq"]
    assert {where[name].name for name in names} == {"decoder.layers.0.self_attn.qkv_proj.weight"}
    joint = np.concatenate([tensors[name] for name in names])
    assert all(np.array_equal(block(joint, where[name].layout.slot), tensors[name]) for name in names)


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
@pytest.mark.parametrize("variant", [*VARIANTS])
def test_a_stored_name_leads_back_to_its_weight_and_layout(format, variant):
    for task in format.tasks:
        config = config_of(variant, num_labels=5, num_hidden_layers=11)
        for name, place in places(format, config, task).items():
            assert canonical_name(published_of(format, place.name)) == name
            assert layout_of(format, name, config) == place.layout


def test_names_that_a_format_does_not_store_lead_nowhere():
    for name in ("model/decoder/layers/00/fc1/kernel", "model/decoder/layers/1/fc1/weight", "decoder", "model.lm_head"):
        assert published_of(FORMATS["flax-msgpack"], name) is None


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ((Rule("decoder.layers.*", "{0}"),), "no rule for decoder.embed_tokens.weight"),
        ((Rule("*", "x"),), "two weights in one place"),
        ((Rule("*", "{0}", dims="FD"),), "cannot be stored as FD"),
    ],
)
def test_a_wrong_table_is_refused(rules, problem):
    with pytest.raises(ValueError, match=problem):
        places(Format("wrong", "w", ".w", rules), config_of(), "base")
