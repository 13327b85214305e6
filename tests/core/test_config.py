"""OPTConfig: published arguments and defaults, validation that lists everything, JSON that loses nothing."""

import copy
import dataclasses
import inspect
import json
import logging
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_core.config import ACTIVATIONS, DTYPES, PROBLEM_TYPES, OPTConfig
from opt_core.errors import ConfigError
from opt_core.generation_config import GenerationConfig
from opt_core.json_file import MAX_JSON_BYTES, read_json_object
from opt_core.presets import PRESETS

# A published file of 2022, with the fields that its tools added.
PUBLISHED_350M = {
    "_name_or_path": "opt-350m",
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": False,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.20.0.dev0",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}


def problems_of(**fields) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        OPTConfig(**fields)
    return caught.value.problems


def written(tmp_path, fields) -> OPTConfig:
    """What is read back from a file that holds `fields`."""
    (tmp_path / "config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return OPTConfig.from_json(tmp_path)


# -- published arguments ----------------------------------------------------------------------------------------------


def test_every_published_argument_is_there_in_order_and_with_its_default():
    transformers = pytest.importorskip("transformers")
    published = inspect.signature(transformers.OPTConfig.__init__).parameters.values()
    published = [(p.name, p.default) for p in published if p.name not in ("self", "kwargs")]
    ours = [(p.name, p.default) for p in inspect.signature(OPTConfig).parameters.values()]
    assert len(published) == 20
    assert ours[: len(published)] == published


@pytest.mark.parametrize(
    "name",
    ["tie_word_embeddings", "torch_dtype", "num_labels", "id2label", "label2id", "problem_type", "output_attentions"]
    + ["output_hidden_states", "architectures", "pruned_heads"],
)
def test_a_field_that_the_published_config_inherits_has_its_value(name):
    transformers = pytest.importorskip("transformers")
    ours, published = OPTConfig(), transformers.OPTConfig()
    name_there = "dtype" if name == "torch_dtype" else name
    assert getattr(ours, name) == getattr(published, name_there)


def test_a_config_of_the_published_class_is_read_with_nothing_left_over(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    transformers.OPTConfig(num_labels=5, ffn_dim=17).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="opt_core"):
        config = OPTConfig.from_json(tmp_path)
    assert (config.num_labels, config.ffn_dim) == (5, 17)
    assert not caplog.records


def test_the_published_class_reads_our_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = OPTConfig.preset("350m", num_labels=3, torch_dtype="float16", enable_bias=False)
    ours.to_json(tmp_path)
    theirs = transformers.OPTConfig.from_pretrained(tmp_path)
    for field in dataclasses.fields(OPTConfig):
        if field.name not in ("extra", "torch_dtype"):
            assert getattr(theirs, field.name) == getattr(ours, field.name), field.name
    assert str(theirs.dtype).endswith("float16")


def test_the_word_embeddings_are_as_wide_as_the_model_unless_told_otherwise():
    assert OPTConfig(hidden_size=36).word_embed_proj_dim == 36
    assert not OPTConfig(hidden_size=36).has_projections
    assert OPTConfig(hidden_size=36, word_embed_proj_dim=7).has_projections


@pytest.mark.parametrize(
    ("pre_norm", "removed", "expected"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_only_pre_norm_models_end_in_a_norm_unless_it_was_removed(pre_norm, removed, expected):
    config = OPTConfig(do_layer_norm_before=pre_norm, _remove_final_layer_norm=removed)
    assert config.has_final_layer_norm is expected


@pytest.mark.parametrize(("given", "ids"), [(None, ()), (2, (2,)), ([2, 5], (2, 5))])
def test_the_ids_that_end_a_text_are_a_tuple_in_every_spelling(given, ids):
    assert OPTConfig(eos_token_id=given).eos_token_ids == ids


# -- pruned heads -----------------------------------------------------------------------------------------------------

SIX_HEADS = dict(hidden_size=6 * 7, num_attention_heads=6, num_hidden_layers=3)


def test_pruned_heads_are_counted_by_layer_in_their_old_numbering():
    config = OPTConfig(**SIX_HEADS, pruned_heads={"1": [4, 0, 4], 2: []})
    assert config.pruned_heads == {1: [0, 4]}
    assert [config.heads_of(layer) for layer in range(3)] == [6, 4, 6]
    assert config.remaining_heads(1) == [1, 2, 3, 5]
    assert (config.num_attention_heads, config.head_size, config.has_all_heads) == (6, 7, False)


def test_pruned_heads_survive_json_and_are_left_out_where_there_are_none(tmp_path):
    config = OPTConfig(**SIX_HEADS, pruned_heads={2: [5], 0: [1, 3]})
    config.to_json(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pruned_heads"] == {"0": [1, 3], "2": [5]}
    assert OPTConfig.from_json(tmp_path) == config
    assert "pruned_heads" not in OPTConfig(**SIX_HEADS).to_dict()


def test_pruning_again_adds_to_what_is_pruned_and_leaves_the_original():
    config = OPTConfig(**SIX_HEADS, pruned_heads={0: [1]})
    assert config.without_heads({0: [3, 1], 2: [0]}).pruned_heads == {0: [1, 3], 2: [0]}
    assert config.pruned_heads == {0: [1]}
    assert config.without_heads({0: [1]}) == config


def test_heads_that_cannot_be_pruned_come_in_one_error():
    with pytest.raises(ConfigError) as caught:
        OPTConfig(**SIX_HEADS, pruned_heads={1: [0, 1, 2]}).without_heads({0: [-1], 1: [3, 4, 5], 2: [6], 3: [0]})
    assert sorted(caught.value.problems) == [
        "pruned_heads: expected at least one head to remain in layer 1, got [0, 1, 2, 3, 4, 5]",
        "pruned_heads: expected heads from 0 to 5 in layer 0, got [-1]",
        "pruned_heads: expected heads from 0 to 5 in layer 2, got [6]",
        "pruned_heads: expected layers from 0 to 2, got 3",
    ]


@pytest.mark.parametrize("wrong", [[1], {0: 1}, {0: ["1"]}, {0: [True]}, None, {"first": [1]}, {None: [1]}], ids=str)
def test_pruned_heads_of_another_kind_are_refused(wrong):
    (problem,) = problems_of(**SIX_HEADS, pruned_heads=wrong)
    assert problem.startswith("pruned_heads: expected")


# -- aliases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "value", "field"), [("bias", False, "enable_bias"), ("dtype", "bfloat16", "torch_dtype")]
)
def test_an_alias_sets_the_published_field_in_files_and_in_replace(alias, value, field):
    assert getattr(OPTConfig.from_dict({alias: value}), field) == value
    assert getattr(OPTConfig().replace(**{alias: value}), field) == value
    assert alias not in OPTConfig.from_dict({alias: value}).to_dict()


def test_an_alias_that_contradicts_its_field_is_refused():
    with pytest.raises(ConfigError, match="bias: False contradicts enable_bias: True"):
        OPTConfig.from_dict({"bias": False, "enable_bias": True})
    assert not OPTConfig.from_dict({"bias": False, "enable_bias": False}).enable_bias


@pytest.mark.parametrize("name", ["float16", "torch.float16"])
def test_a_dtype_is_stored_as_its_bare_name(name):
    assert OPTConfig(torch_dtype=name).torch_dtype == "float16"


def test_swish_is_silu():
    assert OPTConfig(activation_function="swish").activation_function == "silu"


# -- validation -------------------------------------------------------------------------------------------------------


def test_every_wrong_field_is_listed_at_once():
    wrong = dict(
        vocab_size=0,
        ffn_dim="many",
        do_layer_norm_before=1,
        dropout=1.5,
        init_std=float("inf"),
        activation_function="maxout",
        torch_dtype="int8",
        bos_token_id="2",
        problem_type="ranking",
        num_labels=0,
    )
    assert sorted(line.partition(":")[0] for line in problems_of(**wrong)) == sorted(wrong)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (dict(vocab_size=True), "vocab_size: expected an integer from 1 to 10000000, got True"),
        (dict(vocab_size=97.0), "vocab_size: expected an integer from 1 to 10000000, got 97.0"),
        (dict(num_hidden_layers=-1), "num_hidden_layers: expected an integer from 0 to 10000, got -1"),
        (dict(use_cache="yes"), "use_cache: expected true or false, got 'yes'"),
        (dict(attention_dropout=-0.1), "attention_dropout: expected a probability from 0 to 1, got -0.1"),
        (dict(layerdrop=float("nan")), "layerdrop: expected a probability from 0 to 1, got nan"),
        (dict(init_std=-1), "init_std: expected a finite number of at least 0, got -1"),
        (dict(pad_token_id=50272), "pad_token_id: expected an id from 0 to 50271, got 50272"),
        (dict(pad_token_id=[1]), "pad_token_id: expected an integer or null, got [1]"),
        (dict(eos_token_id=[2, None]), "eos_token_id: expected an integer, a list of integers or null, got [2, None]"),
        (
            dict(hidden_size=35, num_attention_heads=3),
            "hidden_size: expected a multiple of num_attention_heads (3), got 35",
        ),
        (
            dict(activation_function="bias"),
            "activation_function: expected one of relu, gelu, gelu_new, silu or a callable, got 'bias'",
        ),
        (dict(id2label={0: "a", 2: "b"}), "id2label: expected names of the labels 0 to 1, got {0: 'a', 2: 'b'}"),
        (dict(id2label={"²": "a"}), "id2label: expected names of the labels 0 to 0, got {'²': 'a'}"),
        (dict(id2label=["a", "b"]), "id2label: expected an object of number to name, got ['a', 'b']"),
        (dict(label2id=["a", "b"]), "label2id: expected an object of name to number, got ['a', 'b']"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected_and_got(fields, line):
    assert problems_of(**fields) == (line,)


def test_a_width_that_the_heads_do_not_divide_is_listed_beside_other_problems():
    names = [line.partition(":")[0] for line in problems_of(hidden_size=35, num_attention_heads=3, dropout=2.0)]
    assert sorted(names) == ["dropout", "hidden_size"]


def test_an_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="hiden_size"):
        OPTConfig(hiden_size=36)


@pytest.mark.parametrize("value", ACTIVATIONS)
def test_every_listed_activation_is_accepted(value):
    assert OPTConfig(activation_function=value).activation_function == value


def test_a_callable_activation_is_accepted_but_cannot_be_written():
    config = OPTConfig(activation_function=abs)
    with pytest.raises(ConfigError, match="activation_function: a callable cannot be written as JSON"):
        config.to_dict()


def test_a_field_set_after_construction_is_checked_when_asked():
    config = OPTConfig()
    config.dropout = 3
    with pytest.raises(ConfigError, match=r"OPTConfig: dropout: expected a probability from 0 to 1, got 3"):
        config.check()


@pytest.mark.parametrize("kind", [OPTConfig, GenerationConfig])
def test_what_is_no_field_cannot_be_set(kind):
    config = kind()
    config.pad_token_id = 3
    with pytest.raises(AttributeError, match=f"{kind.__name__}.pad_tokn_id: unknown field; did you mean pad_token_id"):
        config.pad_tokn_id = 4
    assert copy.deepcopy(config) == config


def test_a_config_survives_pickling():
    config = OPTConfig.preset("350m", num_labels=3)
    assert pickle.loads(pickle.dumps(config)) == config


# -- labels -----------------------------------------------------------------------------------------------------------


def test_labels_follow_from_their_number_and_their_number_from_the_labels():
    assert OPTConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    named = OPTConfig(id2label={"0": "no", "1": "yes", "2": "maybe"})
    assert named.num_labels == 3
    assert named.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert named.label2id == {"no": 0, "yes": 1, "maybe": 2}


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "dtype", "expected"),
    [
        (None, 1, "float32", "regression"),
        (None, 1, "int64", "regression"),
        (None, 3, "int64", "single_label_classification"),
        (None, 3, "uint8", "single_label_classification"),
        (None, 3, "float32", "multi_label_classification"),
        ("regression", 3, "int64", "regression"),
        ("multi_label_classification", 1, "int64", "multi_label_classification"),
    ],
)
def test_the_problem_type_is_inferred_as_the_published_classes_do(problem_type, num_labels, dtype, expected):
    assert OPTConfig(problem_type=problem_type, num_labels=num_labels).problem_type_of(dtype) == expected


# -- JSON -------------------------------------------------------------------------------------------------------------


@st.composite
def configs(draw) -> OPTConfig:
    heads, head_size = draw(st.integers(1, 7)), draw(st.integers(1, 11))
    flag, probability = st.booleans(), st.floats(0, 1)
    labels = st.lists(st.text(max_size=5), min_size=1, max_size=4, unique=True)
    labels = st.one_of(st.none(), labels.map(lambda names: dict(enumerate(names))))
    return OPTConfig(
        vocab_size=draw(st.integers(2, 10_000_000)),
        hidden_size=heads * head_size,
        num_attention_heads=heads,
        num_hidden_layers=draw(st.integers(0, 100)),
        word_embed_proj_dim=draw(st.none() | st.integers(1, 100)),
        do_layer_norm_before=draw(flag),
        enable_bias=draw(flag),
        tie_word_embeddings=draw(flag),
        dropout=draw(probability),
        init_std=draw(st.floats(0, 10)),
        pad_token_id=draw(st.none() | st.integers(0, 1)),
        eos_token_id=draw(st.none() | st.integers(0, 99) | st.lists(st.integers(0, 99), max_size=3)),
        activation_function=draw(st.sampled_from(ACTIVATIONS)),
        torch_dtype=draw(st.sampled_from((None, *DTYPES))),
        problem_type=draw(st.sampled_from((None, *PROBLEM_TYPES))),
        id2label=draw(labels),
        extra=draw(st.dictionaries(st.text("xyz", min_size=1), st.none() | st.integers() | st.text(max_size=3))),
    )


@given(configs())
def test_writing_then_reading_is_the_identity(config):
    assert OPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_file_is_written_with_sorted_keys_to_a_path_or_into_a_folder(tmp_path):
    config = OPTConfig.preset("125m")
    config.to_json(tmp_path)
    config.to_json(tmp_path / "other.json")
    text = (tmp_path / "config.json").read_text()
    assert text == (tmp_path / "other.json").read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert OPTConfig.from_json(tmp_path) == OPTConfig.from_json(tmp_path / "other.json") == config


def test_a_published_file_is_the_preset_of_its_size_and_nothing_is_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="opt_core"):
        config = written(tmp_path, PUBLISHED_350M)
    assert config.replace(extra={}, torch_dtype=None, architectures=None) == OPTConfig.preset("opt-350m")
    assert not caplog.records
    assert config.to_dict().items() >= PUBLISHED_350M.items()


def test_unknown_fields_survive_the_round_trip_and_are_reported_by_name(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="opt_core"):
        config = written(tmp_path, {"hidden_act": "swiglu", "a_list": [1, {"b": None}]})
    assert "a_list, hidden_act" in caplog.text
    assert config.activation_function == "relu"
    config.to_json(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert (again["hidden_act"], again["a_list"]) == ("swiglu", [1, {"b": None}])


def test_names_of_labels_survive_the_round_trip_in_both_directions(tmp_path):
    config = OPTConfig(label2id={"no": 0, "yes": 1})
    assert written(tmp_path, config.to_dict()).label2id == {"no": 0, "yes": 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale_embeddings", True),
        ("learned_embeddings", False),
        ("alibi", True),
        ("rotary", True),
        ("use_stable_embedding", True),
        ("activation_dropout", 0.1),
    ],
)
def test_a_foreign_field_that_changes_the_arithmetic_is_refused(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"{name}: OPT has .*, got {value}, which this code does not compute"):
        written(tmp_path, {name: value})


def test_all_problems_of_a_file_come_in_one_error_that_names_the_file(tmp_path):
    with pytest.raises(ConfigError) as caught:
        written(tmp_path, {"model_type": "llama", "alibi": True, "dropout": 2, "ffn_dim": None})
    assert caught.value.title == str(tmp_path / "config.json")
    names = [line.partition(":")[0] for line in caught.value.problems]
    assert sorted(names) == ["alibi", "dropout", "ffn_dim", "model_type"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"ffn_dim": 3, "dropout": 0, "ffn_dim": 5}', "duplicate key 'ffn_dim'"),
        ('{"x": {"y": 1, "y": 1}}', "duplicate key 'y'"),
        ('{"dropout": NaN}', "the constant NaN is not JSON"),
        ('{"x": -Infinity}', "the constant -Infinity is not JSON"),
        ('{"x": 1e999}', "1e999 is not a finite number"),
        ('{"ffn_dim": 3', "not valid JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ("[" * 100_000, "not valid JSON"),
        ('{"ffn_dim": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_damaged_file_is_refused_and_named(tmp_path, text, complaint):
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        written(tmp_path, text)
    assert complaint in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"x": "\xff"}')
    with pytest.raises(ConfigError, match="not valid JSON"):
        OPTConfig.from_json(tmp_path)


def test_a_file_over_ten_megabytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ConfigError, match=f"expected at most {MAX_JSON_BYTES} bytes of JSON"):
        read_json_object(path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        OPTConfig.from_json(tmp_path / "nothing.json")


# -- replace ----------------------------------------------------------------------------------------------------------


def test_replace_changes_what_it_is_told_and_leaves_the_original():
    config = OPTConfig(extra={"x": [1]})
    changed = config.replace(ffn_dim=17)
    changed.extra["x"].append(2)
    assert (config.ffn_dim, changed.ffn_dim) == (3072, 17)
    assert config.extra == {"x": [1]}
    assert config.replace() == config


def test_replace_derives_labels_and_widths_again():
    config = OPTConfig(id2label={0: "no", 1: "yes"})
    assert config.replace(num_labels=3).label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert config.replace(id2label={0: "one"}).num_labels == 1
    assert config.replace(hidden_size=36).word_embed_proj_dim == 36
    assert config.replace(hidden_size=36, word_embed_proj_dim=7).word_embed_proj_dim == 7
    assert OPTConfig.preset("350m").replace(hidden_size=32).word_embed_proj_dim == 512


def test_replace_checks_and_knows_no_other_names():
    with pytest.raises(ConfigError, match="dropout"):
        OPTConfig().replace(dropout=2)
    with pytest.raises(TypeError, match="hiden_size"):
        OPTConfig().replace(hiden_size=2)


# -- presets ----------------------------------------------------------------------------------------------------------


def test_there_are_nine_opt_and_five_galactica_presets():
    families = [name.partition("-")[0] for name in PRESETS]
    assert (families.count("opt"), families.count("galactica"), len(PRESETS)) == (9, 5, 14)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_by_every_form_of_its_name(name):
    config = OPTConfig.preset(name)
    forms = [f"facebook/{name}", name.upper()] + [name.removeprefix("opt-")] * name.startswith("opt-")
    assert all(OPTConfig.preset(form) == config for form in forms)


def test_presets_take_changes_and_do_not_share_state():
    config = OPTConfig.preset("350m", num_hidden_layers=2, vocab_size=97)
    assert (config.num_hidden_layers, config.vocab_size, config.word_embed_proj_dim) == (2, 97, 512)
    assert OPTConfig.preset("350m").num_hidden_layers == 24


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"expected one of opt-125m, .*galactica-120b, got '124m'"):
        OPTConfig.preset("124m")
