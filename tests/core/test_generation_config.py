"""GenerationConfig: published names and defaults, validation that lists everything, a file that loses nothing."""

import dataclasses
import json

import numpy as np
import pytest

from opt_core.errors import ConfigError
from opt_core.generation_config import GENERATION_CONFIG_NAME, OFF, GenerationConfig
from opt_core.generation_options import NOT_DONE

PUBLISHED_FILE = {  # of facebook/opt-350m
    "_from_model_config": True,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "transformers_version": "4.27.0.dev0",
}
CHANGED = dict(
    max_new_tokens=7, early_stopping="never", stop_strings=["\n\n"], do_sample=True, num_beams=3, temperature=0.7,
    top_k=11, min_p=0.1, repetition_penalty=1.3, bad_words_ids=[[5], [6, 7]], sequence_bias=[[[8, 9], -1.5]],
    eos_token_id=[2, 13], exponential_decay_length_penalty=[5, 1.1], penalty_alpha=0.6, max_time=3.5,
)  # fmt: skip


def problems_of(**fields) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        GenerationConfig(**fields)
    return [problem.partition(":")[0] for problem in caught.value.problems]


def test_names_and_defaults_are_the_published_ones():
    published = pytest.importorskip("transformers").GenerationConfig()
    for f in dataclasses.fields(GenerationConfig):
        if f.name not in ("extra", "output_logits"):  # there None, which is as false
            assert getattr(GenerationConfig(), f.name) == getattr(published, f.name), f.name


def test_every_published_option_is_known_or_refused():
    published = set(vars(pytest.importorskip("transformers").GenerationConfig()))
    inert = {"_from_model_config", "_commit_hash", "transformers_version", "decoder_start_token_id", "is_assistant"}
    known = {f.name for f in dataclasses.fields(GenerationConfig)} | NOT_DONE.keys()
    assert published - known == inert


def test_a_published_file_is_read_and_written_back_as_it_was(tmp_path):
    (tmp_path / GENERATION_CONFIG_NAME).write_text(json.dumps(PUBLISHED_FILE))
    config = GenerationConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 2, 1)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / GENERATION_CONFIG_NAME).read_text()) == PUBLISHED_FILE


def test_what_was_changed_comes_back_from_a_file_and_is_read_by_the_published_class(tmp_path):
    config = GenerationConfig(**CHANGED, extra={"a_new_option": 5})
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == config
    assert GenerationConfig.from_pretrained(tmp_path / GENERATION_CONFIG_NAME) == config
    published = pytest.importorskip("transformers").GenerationConfig.from_pretrained(tmp_path)
    for name, value in CHANGED.items():
        assert getattr(published, name) == value, name


def test_a_file_of_the_published_class_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.GenerationConfig(**CHANGED).save_pretrained(tmp_path)
    read = GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(read, name) for name in CHANGED} == CHANGED


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"top_k": 3, "top_k": 4}', "duplicate key"),
        ('{"temperature": NaN}', "NaN"),
        ("[]", "expected a JSON object"),
        ('{"top_k": -1}', "top_k: expected an integer of at least 0, got -1"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, text, problem):
    (tmp_path / GENERATION_CONFIG_NAME).write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        GenerationConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


WRONG = {
    "max_length": [0, -1, 2.0, True, "5"],
    "max_new_tokens": [0, 1.5],
    "min_length": [-1, 1.0],
    "early_stopping": [1, "always"],
    "max_time": [0, -1.0, float("inf"), float("nan")],
    "stop_strings": ["", [], ["a", ""], [3]],
    "do_sample": [1, "yes", None],
    "num_beams": [0, None, 2.5],
    "temperature": [0, -1.0, float("nan"), "warm"],
    "top_k": [-1, 2.5],
    "top_p": [-0.1, 1.1, float("nan")],
    "min_p": [1.5],
    "typical_p": [0, 1.1],
    "epsilon_cutoff": [1, -0.1],
    "repetition_penalty": [0, -1],
    "length_penalty": [float("inf"), "1"],
    "bad_words_ids": [[5], [[]], [[-1]], [[1.5]], "word"],
    "sequence_bias": [[[5, 1.0]], [[[], 1.0]], [[[5], float("nan")]], [[[5], "1"]], 3],
    "exponential_decay_length_penalty": [5, (1,), (1, 0)],
    "suppress_tokens": [5, [-1]],
    "eos_token_id": [-1, 2.5, [2, "3"]],
    "pad_token_id": [-1, [1]],
    "num_assistant_tokens_schedule": ["often"],
    "penalty_alpha": [-0.1, 2],
    "extra": [[]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_that_an_option_cannot_have_is_named(name, value):
    assert problems_of(**{name: value}) == [name]


def test_all_that_is_wrong_is_listed_at_once():
    assert problems_of(top_p=2, num_beams=0, eos_token_id=-1) == ["num_beams", "top_p", "eos_token_id"]


def test_numbers_of_numpy_tuples_and_dicts_become_what_json_can_hold():
    config = GenerationConfig(
        eos_token_id=np.array([2, 5]), top_k=np.int64(3), temperature=2, bad_words_ids=((5, 6),),
        sequence_bias={(7, 8): 1.5}, suppress_tokens=(3,),
    )  # fmt: skip
    assert json.loads(json.dumps(config.to_dict())) == {
        "eos_token_id": [2, 5], "top_k": 3, "temperature": 2.0, "bad_words_ids": [[5, 6]],
        "sequence_bias": [[[7, 8], 1.5]], "suppress_tokens": [3],
    }  # fmt: skip


@pytest.mark.parametrize("name", OFF)
def test_none_turns_off_what_can_be_off(name):
    assert getattr(GenerationConfig(**{name: None}), name) == OFF[name]
    assert getattr(GenerationConfig().replace(**{name: None}), name) == OFF[name]


def test_replace_leaves_the_original_and_keeps_what_is_not_given():
    config = GenerationConfig(**CHANGED)
    other = config.replace(num_beams=5, max_new_tokens=None)
    assert (other.num_beams, other.max_new_tokens) == (5, 7)
    other.bad_words_ids.append([1])
    assert config == GenerationConfig(**CHANGED)


def test_an_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="top_q"):
        GenerationConfig(top_q=3)
