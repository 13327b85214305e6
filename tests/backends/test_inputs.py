"""Bad input: one clear error, the same words in every backend."""

import numpy as np
import pytest
from harness import config_of, save_random, token_ids

V, P = 97, 41


def ids_with(value, row=1, column=2):
    ids = token_ids(config_of(), 3, 5)
    ids[row, column] = value
    return ids


# name -> (arguments, the whole message)
BAD = {
    "an id beyond the vocabulary": (
        dict(input_ids=ids_with(V)),
        "invalid arguments: input_ids: expected 0 to 96 (vocab_size = 97), got 97 at row 1, column 2",
    ),
    "a negative id": (
        dict(input_ids=ids_with(-1)),
        "invalid arguments: input_ids: expected 0 to 96 (vocab_size = 97), got -1 at row 1, column 2",
    ),
    "a position beyond the table": (
        dict(input_ids=token_ids(config_of(), 1, 3), position_ids=np.array([[0, P, P]])),
        "invalid arguments: position_ids: expected 0 to 40 (max_position_embeddings = 41), got 41 at row 0, "
        "column 1, the first of 2",
    ),
    "a negative position": (
        dict(input_ids=token_ids(config_of(), 1, 3), position_ids=np.array([[-3, 0, 1]])),
        "invalid arguments: position_ids: expected 0 to 40 (max_position_embeddings = 41), got -3 at row 0, column 0",
    ),
    "positions of another shape": (
        dict(input_ids=token_ids(config_of(), 2, 3), position_ids=np.zeros((3, 3), int)),
        "invalid arguments: position_ids: expected shape (2, 3) or (1, 3), got (3, 3)",
    ),
    "float positions": (
        dict(input_ids=token_ids(config_of(), 1, 2), position_ids=np.zeros((1, 2), np.float32)),
        "invalid arguments: position_ids: expected an integer dtype, got float32",
    ),
    "float ids": (
        dict(input_ids=np.zeros((1, 2), np.float32)),
        "invalid arguments: input_ids: expected an integer dtype, got float32",
    ),
    "ids without a batch": (
        dict(input_ids=np.array([5, 6])),
        "invalid arguments: input_ids: expected shape (batch, tokens) with at least one token, got (2,)",
    ),
    "text for ids": (
        dict(input_ids=["a text"]),
        "invalid arguments: expected numbers, in an array or in nested lists of equal length, got ['a text']",
    ),
    "rows of different lengths": (
        dict(input_ids=[[5, 6], [7]]),
        "invalid arguments: expected numbers, in an array or in nested lists of equal length, got [[5, 6], [7]]",
    ),
    "no tokens": (
        dict(input_ids=np.zeros((2, 0), int)),
        "invalid arguments: input_ids: expected shape (batch, tokens) with at least one token, got (2, 0)",
    ),
    "too long": (
        dict(input_ids=token_ids(config_of(), 1, P + 1)),
        "invalid arguments: sequence: expected at most max_position_embeddings = 41 real tokens a row, got 42",
    ),
    "a mask too short": (
        dict(input_ids=token_ids(config_of(), 2, 5), attention_mask=np.ones((2, 4), int)),
        "invalid arguments: attention_mask: expected shape (2, 5), got (2, 4)",
    ),
    "a mask that would broadcast": (
        dict(input_ids=token_ids(config_of(), 2, 5), attention_mask=np.ones((2, 1), int)),
        "invalid arguments: attention_mask: expected shape (2, 5), got (2, 1)",
    ),
    "a 4-D mask": (
        dict(input_ids=token_ids(config_of(), 2, 5), attention_mask=np.ones((2, 1, 5, 5), int)),
        "invalid arguments: attention_mask: expected shape (2, 5), got (2, 1, 5, 5)",
    ),
    "a soft mask": (
        dict(input_ids=token_ids(config_of(), 1, 2), attention_mask=np.array([[0.5, 1]], np.float32)),
        "invalid arguments: attention_mask: expected 1 for real tokens and 0 for padding, got 0.5",
    ),
    "no input": ({}, "invalid arguments: input_ids, inputs_embeds: expected exactly one of them, got neither"),
    "two inputs": (
        dict(input_ids=token_ids(config_of(), 1, 2), inputs_embeds=np.zeros((1, 2, 35), np.float32)),
        "invalid arguments: input_ids, inputs_embeds: expected exactly one of them, got both",
    ),
    "embeddings of another width": (
        dict(inputs_embeds=np.zeros((1, 2, 34), np.float32)),
        "invalid arguments: inputs_embeds: expected shape (batch, tokens, 35) with at least one token, got (1, 2, 34)",
    ),
    "a misspelt keyword": (
        dict(input_ids=token_ids(config_of(), 1, 2), atention_mask=np.ones((1, 2), int)),
        "invalid arguments: atention_mask: unknown keyword; did you mean attention_mask?",
    ),
    "a head mask of another model": (
        dict(input_ids=token_ids(config_of(), 1, 2), head_mask=np.ones((2, 5), int)),
        "invalid arguments: head_mask: expected shape (3, 5), or (5,) for all layers, got (2, 5)",
    ),
    "logits_to_keep below zero": (
        dict(input_ids=token_ids(config_of(), 1, 2), logits_to_keep=-1),
        "invalid arguments: logits_to_keep: expected an integer of at least 0 (0: all), got -1",
    ),
    "labels of another shape": (
        dict(input_ids=token_ids(config_of(), 1, 3), labels=np.zeros((1, 2), int)),
        "invalid arguments: labels: expected shape (1, 3), got (1, 2)",
    ),
    "a label beyond the vocabulary": (
        dict(input_ids=token_ids(config_of(), 1, 3), labels=np.array([[4, V, -100]])),
        "invalid arguments: labels: expected 0 to 96, or -100 to ignore, got 97",
    ),
    "two problems at once": (
        dict(input_ids=ids_with(V), position_ids=np.full((3, 5), P)),
        "invalid arguments: 2 problems\n"
        "  - position_ids: expected 0 to 40 (max_position_embeddings = 41), got 41 at row 0, column 0, "
        "the first of 15\n"
        "  - input_ids: expected 0 to 96 (vocab_size = 97), got 97 at row 1, column 2",
    ),
}


@pytest.fixture(scope="module")
def model(backend):
    return backend.random_model(config_of())


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_the_same_words_by_every_backend(model, case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole message is compared
        model(**arguments)
    assert str(caught.value) == message


def test_a_misspelt_keyword_is_a_type_error_too(model):
    with pytest.raises(TypeError, match="did you mean use_cache"):
        model(token_ids(config_of(), 1, 2), usecache=True)


def test_check_inputs_says_the_same_without_running_the_model(model):
    arguments, message = BAD["two problems at once"]
    with pytest.raises(ValueError, match="2 problems") as caught:
        model.check_inputs(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["flash", "Eager", None])
def test_an_attention_that_does_not_exist_is_refused(backend, model, name):
    match = f"attn_implementation: expected one of eager, sdpa.*, got {name!r}"
    with pytest.raises(ValueError, match=match):
        backend.model_class()(config_of(), attn_implementation=name)
    with pytest.raises(ValueError, match=match):
        model.set_attn_implementation(name)


def test_what_is_no_config_is_refused(backend, tmp_path):
    problem = "config: expected an opt_core.OPTConfig, got dict"
    with pytest.raises(ValueError, match=problem):
        backend.model_class()(config_of().to_dict())
    with pytest.raises(ValueError, match=problem):
        backend.model_class().from_pretrained(save_random(tmp_path, config_of()), config=config_of().to_dict())


def test_an_invalid_config_is_refused_before_a_weight_is_made(backend):
    config = config_of()
    config.num_attention_heads = 4
    with pytest.raises(ValueError, match=r"hidden_size: expected a multiple of num_attention_heads \(4\), got 35"):
        backend.model_class()(config)
