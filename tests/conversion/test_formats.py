"""The table of formats: every weight has one place in each, and layouts invert; further formats need only a table."""

import numpy as np
import pytest
from checkpoints import VARIANTS, config_of, tensors_of

from conversion.formats import FORMATS, Format, Rule, place_of, places, published_of, refusals
from conversion.layout import block, schema_shape, stored_shape, to_schema, to_stored
from conversion.names import canonical_name
from opt_core.schema import TASKS, published_name, shapes

SIZES = dict(num_labels=5, num_hidden_layers=12, vocab_size=102, ffn_dim=38)
HELD = [
    pytest.param(format, variant, task, id=f"{format.name}-{variant}-{task}")
    for format in FORMATS.values()
    for variant in VARIANTS
    for task in format.tasks
    if not refusals(format, config_of(variant, **SIZES), task)
]
PARALLEL = [
    pytest.param(format, variant, id=f"{format.name}-{variant}")
    for format in FORMATS.values()
    for variant in VARIANTS
    if not refusals(format, config_of(variant, **SIZES), "causal-lm", parts=2)
]


@pytest.mark.parametrize(("format", "variant", "task"), HELD)
def test_every_weight_has_one_place_and_every_layout_inverts(format, variant, task):
    config = config_of(variant, **SIZES)
    where = places(format, config, task)
    tensors = tensors_of(config, task)
    assert where.keys() == shapes(config, task).keys()
    assert len({(place.name, place.layout.slot) for place in where.values()}) == len(where)
    for name, place in where.items():
        stored = to_stored(tensors[name], place.layout)
        assert stored.shape == stored_shape(place.layout), name
        assert schema_shape(stored.shape, place.layout) == tensors[name].shape, name
        back = to_schema(stored, place.layout)
        skipped = place.layout.skip_rows
        assert np.array_equal(back[skipped:], tensors[name][skipped:]), name
        assert back.shape == tensors[name].shape, name
        assert not back[:skipped].any(), name


@pytest.mark.parametrize(("format", "variant"), PARALLEL)
def test_pieces_of_model_parallel_parts_are_disjoint_and_make_the_whole(format, variant):
    config, parts = config_of(variant, **SIZES), 2
    for name, place in places(format, config, "causal-lm", parts).items():
        whole = shapes(config, "causal-lm")[name]
        of_a_part = tuple(place.layout.lengths[letter] for letter in place.layout.dims)
        times = [parts if axis == place.axis else 1 for axis in range(len(whole))]
        assert tuple(length * time for length, time in zip(of_a_part, times, strict=True)) == whole, name


def test_parts_that_do_not_divide_a_weight_are_refused_with_every_length():
    config = config_of(num_attention_heads=11)
    problems = "; ".join(refusals(FORMATS["metaseq"], config, "causal-lm", parts=2))
    for length in ("heads: expected a multiple of 2, to be cut into as many parts, got 11", "got 101", "got 31"):
        assert length in problems
    assert "expected 1 for safetensors" in refusals(FORMATS["safetensors"], config, "causal-lm", parts=2)[0]


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
    where = places(FORMATS["flax-safetensors"], config, "causal-lm")
    name = "decoder.layers.1.self_attn.q_proj.weight"
    assert where[name].name == "model.decoder.layers.1.self_attn.q_proj.kernel"
    assert np.array_equal(to_stored(tensors[name], where[name].layout), tensors[name].T)
    assert where["decoder.layers.1.final_layer_norm.weight"].name == "model.decoder.layers.1.final_layer_norm.scale"
    assert where["decoder.embed_tokens.weight"].layout.is_identity


def test_joined_heads_are_split_as_the_reshape_of_the_transpose():
    config = config_of()
    tensors = tensors_of(config)
    where = places(FORMATS["keras-hub"], config, "base")
    query, out = (f"decoder.layers.2.self_attn.{part}_proj.weight" for part in ("q", "out"))
    assert where[query].name == "layers/transformer_decoder_2/_self_attention_layer/query_dense/vars/0"
    assert np.array_equal(to_stored(tensors[query], where[query].layout), tensors[query].T.reshape(22, 2, 11))
    assert np.array_equal(to_stored(tensors[out], where[out].layout), tensors[out].T.reshape(2, 11, 22))
    positions = "decoder.embed_positions.weight"
    assert np.array_equal(to_stored(tensors[positions], where[positions].layout), tensors[positions][2:])


def test_fused_keys_values_and_queries_are_blocks_of_one_tensor():
    config = config_of()
    tensors = tensors_of(config)
    where = places(FORMATS["metaseq"], config, "causal-lm")
    names = [f"decoder.layers.0.self_attn.{letter}_proj.weight" for letter in "kvq"]
    assert {where[name].name for name in names} == {"decoder.layers.0.self_attn.qkv_proj.weight"}
    joint = np.concatenate([tensors[name] for name in names])
    assert all(np.array_equal(block(joint, where[name].layout.slot), tensors[name]) for name in names)


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
@pytest.mark.parametrize("variant", [*VARIANTS])
def test_a_stored_name_leads_back_to_its_weight_and_layout(format, variant):
    for task in format.tasks:
        config = config_of(variant, num_labels=5, num_hidden_layers=12)
        if refusals(format, config, task):
            continue
        for name, place in places(format, config, task).items():
            number = place.layout.slot[0] if place.layout.slot else 0
            assert canonical_name(published_of(format, place.name)[number]) == name
            assert place_of(format, name, config, task) == place


def test_names_that_a_format_does_not_store_lead_nowhere():
    for name in ("model/decoder/layers/00/fc1/kernel", "model/decoder/layers/1/fc1/weight", "decoder", "model.lm_head"):
        assert published_of(FORMATS["flax-msgpack"], name) == ()


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


def test_every_format_holds_the_architecture_of_the_published_models():
    held = {param.values[0].name for param in HELD if param.values[1:] == ("pre-norm", "causal-lm")}
    assert held == set(FORMATS)
    assert {param.values for param in HELD} > {(FORMATS["metaseq-singleton"], "350m-style", "causal-lm")}
