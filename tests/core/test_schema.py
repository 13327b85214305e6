"""The table of weights against published counts and names, and the strict check that is derived from it."""

import string

import numpy as np
import pytest
from harness import PRUNED_HEADS, VARIANTS, config_of, pruned_tensors

from opt_core import OPTConfig
from opt_core.errors import CheckpointError
from opt_core.schema import (
    AXES,
    SCHEMA,
    TASKS,
    check_shapes,
    head_names,
    parameter_count,
    published_name,
    shapes,
    tensor_count,
    weights,
)
from opt_core.synthetic import random_tensors

# Parameters and tensors of the published files, the tied head not counted.
PUBLISHED_COUNTS = {
    "opt-125m": (125_239_296, 196),
    "opt-350m": (331_196_416, 388),
    "opt-1.3b": (1_315_758_080, 388),
    "opt-2.7b": (2_651_596_800, 516),
    "opt-6.7b": (6_658_473_984, 516),
    "opt-13b": (12_853_473_280, 644),
    "opt-30b": (29_974_540_288, 772),
    "opt-66b": (65_719_701_504, 1028),
    "opt-175b": (174_604_468_224, 1540),
    "galactica-125m": (125_030_400, 196),
    "galactica-1.3b": (1_315_201_024, 388),
    "galactica-6.7b": (6_657_359_872, 516),
    "galactica-30b": (29_972_590_592, 772),
    "galactica-120b": (121_341_747_200, 1540),
}
CLASS_OF_TASK = {
    "base": "OPTModel",
    "causal-lm": "OPTForCausalLM",
    "sequence-classification": "OPTForSequenceClassification",
    "question-answering": "OPTForQuestionAnswering",
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_a_published_size_has_its_published_parameters_and_tensors(name):
    config = OPTConfig.preset(name)
    assert (parameter_count(config), tensor_count(config)) == PUBLISHED_COUNTS[name]


def test_the_base_model_has_what_the_tied_language_model_has():
    config = OPTConfig.preset("350m")
    assert shapes(config, "base") == shapes(config, "causal-lm")


def test_no_two_rows_share_a_name():
    names = [row.name for row in SCHEMA]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", SCHEMA, ids=lambda row: row.name)
def test_a_row_speaks_the_language_of_the_legend(row):
    assert set(row.dims) <= AXES.keys()
    assert len(row.dims) == {"linear": 2, "embedding": 2, "scale": 1, "bias": 1}[row.kind]
    assert row.tasks
    assert set(row.tasks) <= set(TASKS)
    assert all(hasattr(OPTConfig(), switch) for switch in row.present)
    assert {field for _, field, _, _ in string.Formatter().parse(row.name) if field} <= {"layer"}


def test_what_a_row_is_tied_to_is_another_row_of_the_same_dimensions():
    rows = {row.name: row for row in SCHEMA}
    tied = [row for row in SCHEMA if row.tied_to]
    assert [row.name for row in tied] == ["lm_head.weight"]
    assert all(rows[row.tied_to].dims == row.dims for row in tied)


def test_a_bias_is_as_long_as_the_first_dimension_of_its_weight():
    rows = {row.name: row for row in SCHEMA}
    for name, row in rows.items():
        if name.endswith(".bias"):
            assert row.dims == rows[name.removesuffix("bias") + "weight"].dims[0]


@pytest.mark.parametrize(
    ("switches", "ending", "expected"),
    [
        ({}, "fc1.bias", 3),
        (dict(enable_bias=False), "fc1.bias", 0),
        (dict(enable_bias=False), "layer_norm.bias", 7),
        (dict(layer_norm_elementwise_affine=False), "layer_norm.weight", 0),
        (dict(layer_norm_elementwise_affine=False), "fc2.bias", 3),
        (dict(do_layer_norm_before=False), "layer_norm.weight", 6),
        (dict(_remove_final_layer_norm=True), "layer_norm.weight", 6),
        ({}, "project_in.weight", 0),
        (dict(word_embed_proj_dim=19), "project_in.weight", 1),
        (dict(word_embed_proj_dim=19), "project_out.weight", 1),
        ({}, "lm_head.weight", 0),
        (dict(tie_word_embeddings=False), "lm_head.weight", 1),
        (dict(num_hidden_layers=0), "self_attn.q_proj.weight", 0),
    ],
)
def test_a_switch_adds_and_removes_its_weights(switches, ending, expected):
    assert sum(name.endswith(ending) for name in shapes(config_of(**switches))) == expected


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_those_of_the_published_class(variant, task):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = config_of(variant, num_labels=3)
    published_config = transformers.OPTConfig(**config.to_dict())
    # Skips the published initialisation, which fails on norms without weights (`NoneType` has no `data`).
    with transformers.modeling_utils.no_init_weights(), torch.device("meta"):
        model = getattr(transformers, CLASS_OF_TASK[task])(published_config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        theirs.pop("lm_head.weight", None)
    ours = {published_name(name, task): shape for name, shape in shapes(config, task).items()}
    assert ours == theirs


def test_weights_come_in_the_order_of_the_published_modules():
    names = list(shapes(config_of("350m style", num_hidden_layers=2)))
    first = [name for name in names if ".layers.0." in name]
    assert names[:3] == ["decoder.embed_tokens.weight", "decoder.embed_positions.weight", "decoder.project_in.weight"]
    assert names[3 : 3 + len(first)] == first
    assert names[-1] == "decoder.project_out.weight"


def test_the_start_and_end_of_an_answer_are_two_whatever_the_number_of_labels():
    config = config_of(num_labels=7)
    assert shapes(config, "question-answering")["qa_outputs.weight"] == (2, 35)
    assert shapes(config, "sequence-classification")["score.weight"] == (7, 35)


def test_a_layer_without_some_heads_has_narrower_weights_and_the_others_have_not():
    whole, pruned = config_of(), config_of(pruned_heads=PRUNED_HEADS)
    was, now = shapes(whole), shapes(pruned)
    narrower = {name for name in was if was[name] != now[name]}
    attention = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight"]
    attention += ["q_proj.bias", "k_proj.bias", "v_proj.bias"]
    assert narrower == {f"decoder.layers.{layer}.self_attn.{name}" for layer in PRUNED_HEADS for name in attention}
    assert now["decoder.layers.0.self_attn.k_proj.weight"] == (3 * 7, 35)
    assert now["decoder.layers.2.self_attn.out_proj.weight"] == (35, 2 * 7)
    assert now["decoder.layers.2.self_attn.v_proj.bias"] == (2 * 7,)
    assert parameter_count(whole) - parameter_count(pruned) == 5 * 7 * (4 * 35 + 3)


def test_the_check_names_a_tensor_of_a_pruned_layer_with_its_own_shape():
    with pytest.raises(CheckpointError) as caught:
        check_shapes(shapes(config_of()), config_of(pruned_heads={1: [3]}), source="here")
    assert "decoder.layers.1.self_attn.q_proj.weight: expected (28, 35), got (35, 35)" in caught.value.problems
    assert "decoder.layers.1.self_attn.out_proj.weight: expected (35, 28), got (35, 35)" in caught.value.problems
    assert len(caught.value.problems) == 7


def test_pruning_twice_keeps_what_pruning_at_once_keeps():
    whole = config_of()
    once, twice = whole.without_heads({1: [2]}), whole.without_heads({1: [2, 4, 0]})
    tensors = dict(random_tensors(whole))
    by_steps = pruned_tensors(pruned_tensors(tensors, whole, once), once, twice)
    at_once = pruned_tensors(tensors, whole, twice)
    assert {name: array.shape for name, array in at_once.items()} == shapes(twice)
    assert all(np.array_equal(by_steps[name], at_once[name]) for name in at_once)


def test_an_unknown_task_lists_those_there_are():
    with pytest.raises(ValueError, match=r"task: expected one of base, causal-lm, .*, got 'translation'"):
        list(weights(config_of(), "translation"))


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("decoder.layers.0.fc1.weight", "base", "decoder.layers.0.fc1.weight"),
        ("decoder.layers.0.fc1.weight", "causal-lm", "model.decoder.layers.0.fc1.weight"),
        ("lm_head.weight", "causal-lm", "lm_head.weight"),
        ("score.weight", "sequence-classification", "score.weight"),
    ],
)
def test_only_what_lies_in_the_decoder_takes_the_prefix(name, task, expected):
    assert published_name(name, task) == expected


def test_heads_that_fine_tuning_starts_anew_are_not_those_that_may_be_tied():
    assert {task: head_names(task) for task in TASKS} == {
        "base": (),
        "causal-lm": (),
        "sequence-classification": ("score.weight",),
        "question-answering": ("qa_outputs.weight", "qa_outputs.bias"),
    }


# -- the strict check -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_of_exactly_the_schema_passes(task):
    config = config_of("untied head", num_labels=3)
    check_shapes(shapes(config, task), config, task, source="here")


def test_missing_unexpected_and_misshaped_tensors_come_in_one_error():
    config = config_of()
    found = shapes(config)
    del found["decoder.layers.1.fc2.bias"], found["decoder.layers.2.self_attn.q_proj.weight"]
    found["decoder.layers.0.fc1.weight"] = (35, 53)
    found["decoder.version"] = (1,)
    with pytest.raises(CheckpointError) as caught:
        check_shapes(found, config, source="folder")
    assert caught.value.title == "folder"
    assert sorted(caught.value.problems) == [
        "decoder.layers.0.fc1.weight: expected (53, 35), got (35, 53)",
        "decoder.layers.1.fc2.bias: missing, expected (35,)",
        "decoder.layers.2.self_attn.q_proj.weight: missing, expected (35, 35)",
        "decoder.version: unexpected, got (1,)",
    ]


def test_names_that_may_be_absent_may_come_from_a_generator():
    config = config_of()
    lacking = ("decoder.layers.1.fc2.bias", "decoder.embed_tokens.weight", "decoder.final_layer_norm.bias")
    found = {name: shape for name, shape in shapes(config).items() if name not in lacking}
    check_shapes(found, config, source="here", may_lack=(name for name in lacking))
    with pytest.raises(CheckpointError, match=r"fc2\.bias: missing"):
        check_shapes(found, config, source="here", may_lack=lacking[1:])


def test_a_tensor_that_may_be_absent_must_have_its_shape_when_it_is_there():
    config = config_of(num_labels=3)
    found = shapes(config, "sequence-classification") | {"score.weight": (2, 35)}
    with pytest.raises(CheckpointError, match=r"score\.weight: expected \(3, 35\), got \(2, 35\)"):
        check_shapes(found, config, "sequence-classification", source="here", may_lack=["score.weight"])
