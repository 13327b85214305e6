"""What a model says to wrong arguments: the words that the three backends share."""

import numpy as np
import pytest
from harness import MASKS, config_of, mask_named
from hypothesis import given
from hypothesis import strategies as st

from opt_core.checks import (
    Known,
    KnownCache,
    check_choice,
    check_head_mask,
    check_inputs,
    check_labels,
)
from opt_core.errors import InputError

CONFIG = config_of(vocab_size=97, max_position_embeddings=11, word_embed_proj_dim=19)


def known(values, dtype=None) -> Known:
    values = np.asarray(values, dtype)
    return Known(values.shape, str(values.dtype), values)


def rows(*drawn: str) -> Known:
    """A mask drawn as rows of 0 and 1."""
    return known([[int(c) for c in row] for row in drawn])


def tokens(batch=2, length=5, value=7) -> Known:
    return known(np.full((batch, length), value))


def problems_of(**arguments) -> tuple[str, ...]:
    with pytest.raises(InputError, match="invalid arguments") as caught:
        check_inputs(CONFIG, **arguments)
    return caught.value.problems


# -- what the call is fed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({}, "input_ids, inputs_embeds: expected exactly one of them, got neither"),
        (
            dict(input_ids=tokens(), inputs_embeds=Known((2, 5, 19), "float32")),
            "input_ids, inputs_embeds: expected exactly one of them, got both",
        ),
        (
            dict(input_ids=known([1, 2, 3])),
            "input_ids: expected shape (batch, tokens) with at least one token, got (3,)",
        ),
        (
            dict(input_ids=known(np.zeros((2, 0), int))),
            "input_ids: expected shape (batch, tokens) with at least one token, got (2, 0)",
        ),
        (dict(input_ids=known([[1.0, 2.0]])), "input_ids: expected an integer dtype, got float64"),
        (
            dict(inputs_embeds=Known((2, 5, 35), "float32")),
            "inputs_embeds: expected shape (batch, tokens, 19) with at least one token, got (2, 5, 35)",
        ),
        (
            dict(input_ids=known([[5, 97]])),
            "input_ids: expected 0 to 96 (vocab_size = 97), got 97 at row 0, column 1",
        ),
        (
            dict(input_ids=known([[5, 6], [-100, 97]])),
            "input_ids: expected 0 to 96 (vocab_size = 97), got -100 at row 1, column 0, the first of 2",
        ),
        (
            dict(input_ids=tokens(length=12)),
            "sequence: expected at most max_position_embeddings = 11 real tokens a row, got 12",
        ),
        (
            dict(input_ids=tokens(), attention_mask=rows("11111")),
            "attention_mask: expected shape (2, 5), got (1, 5)",
        ),
        (
            dict(input_ids=tokens(), attention_mask=rows("1", "1")),
            "attention_mask: expected shape (2, 5), got (2, 1)",
        ),
        (
            dict(input_ids=tokens(), attention_mask=Known((2, 1, 5, 5), "float32")),
            "attention_mask: expected shape (2, 5), got (2, 1, 5, 5)",
        ),
        (
            dict(input_ids=tokens(1, 3), attention_mask=known([[1, 0.5, 1]])),
            "attention_mask: expected 1 for real tokens and 0 for padding, got 0.5",
        ),
        (
            dict(input_ids=tokens(1, 3), attention_mask=known([[1, -1, 1]])),
            "attention_mask: expected 1 for real tokens and 0 for padding, got -1",
        ),
        (
            dict(input_ids=tokens(), position_ids=known(np.zeros((2, 4), int))),
            "position_ids: expected shape (2, 5) or (1, 5), got (2, 4)",
        ),
        (
            dict(input_ids=tokens(1, 2), position_ids=known([[0.0, 1.0]])),
            "position_ids: expected an integer dtype, got float64",
        ),
        (
            dict(input_ids=tokens(1, 2), position_ids=known([[0, 11]])),
            "position_ids: expected 0 to 10 (max_position_embeddings = 11), got 11 at row 0, column 1",
        ),
        (
            dict(input_ids=tokens(2, 2), position_ids=known([[-1, 0]])),
            "position_ids: expected 0 to 10 (max_position_embeddings = 11), got -1 at row 0, column 0, the first of 2",
        ),
        (
            dict(input_ids=tokens(), logits_to_keep=-1),
            "logits_to_keep: expected an integer of at least 0 (0: all), got -1",
        ),
        (
            dict(input_ids=tokens(), logits_to_keep=True),
            "logits_to_keep: expected an integer of at least 0 (0: all), got True",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected_and_got(arguments, line):
    assert problems_of(**arguments) == (line,)


def test_everything_wrong_is_listed_at_once():
    lines = problems_of(
        input_ids=known([[5, 97, 3]]),
        attention_mask=rows("11"),
        position_ids=known([[0, 1]]),
        cache=KnownCache(2, 7, np.array([0, 0])),
        logits_to_keep=-3,
    )
    assert [line.partition(":")[0] for line in lines] == [
        "attention_mask",
        "past_key_values",
        "position_ids",
        "input_ids",
        "logits_to_keep",
    ]


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "int64", "float32"])
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "none"])
def test_a_mask_of_zeros_and_ones_is_accepted_in_every_dtype(mask, dtype):
    values = mask_named(mask)
    check_inputs(config_of(), input_ids=tokens(*values.shape), attention_mask=known(values, dtype))


def test_a_long_sequence_passes_where_its_real_tokens_have_positions():
    check_inputs(CONFIG, input_ids=tokens(1, 13), attention_mask=rows("0011111111111"))


def test_a_position_of_a_padding_token_is_not_looked_at_but_its_id_is():
    mask, positions = rows("011"), known([[-5, 0, 1]])
    check_inputs(CONFIG, input_ids=tokens(1, 3), attention_mask=mask, position_ids=positions)
    assert problems_of(input_ids=known([[97, 3, 4]]), attention_mask=mask)[0].startswith("input_ids: expected 0 to 96")


def test_a_batch_of_no_rows_is_accepted():
    check_inputs(CONFIG, input_ids=known(np.zeros((0, 3), int)))


@given(st.data())
def test_ids_are_accepted_exactly_when_all_lie_in_the_vocabulary(data):
    shape = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 11))
    ids = data.draw(st.lists(st.integers(-3, 100), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    arguments = dict(input_ids=known(np.reshape(ids, shape)))
    if all(0 <= i < 97 for i in ids):
        check_inputs(CONFIG, **arguments)
    else:
        wrong = next(i for i in ids if not 0 <= i < 97)
        assert f"got {wrong} at" in problems_of(**arguments)[0]


@given(st.lists(st.lists(st.booleans(), min_size=13, max_size=13), min_size=1, max_size=3))
def test_a_padded_batch_is_accepted_exactly_when_its_longest_row_has_positions(mask):
    arguments = dict(input_ids=tokens(len(mask), 13), attention_mask=known(mask))
    longest = max(map(sum, mask))
    if longest <= 11:
        check_inputs(CONFIG, **arguments)
    else:
        assert problems_of(**arguments)[0].endswith(f"got {longest}")


# -- what is not known in a compiled function -------------------------------------------------------------------------


def test_without_values_only_shapes_and_dtypes_are_checked():
    traced = Known((2, 5), "int64")
    check_inputs(CONFIG, input_ids=traced, attention_mask=traced, position_ids=traced)
    assert problems_of(input_ids=traced, attention_mask=Known((2, 4), "int64")) == (
        "attention_mask: expected shape (2, 5), got (2, 4)",
    )


def test_a_size_that_is_unknown_agrees_with_every_size():
    unknown = Known((None, None), "int32")
    check_inputs(CONFIG, input_ids=unknown, attention_mask=Known((2, 5), "int32"), position_ids=Known((2, 5), "int32"))
    check_inputs(CONFIG, input_ids=Known((2, 5), "int32"), attention_mask=unknown, position_ids=unknown)


def test_a_traced_sequence_without_a_mask_is_measured_by_its_columns():
    assert "max_position_embeddings" in problems_of(input_ids=Known((None, 12), "int32"))[0]
    check_inputs(CONFIG, input_ids=Known((2, 12), "int32"), attention_mask=Known((2, 12), "int32"))


# -- the cache --------------------------------------------------------------------------------------------------------


def cache(capacity=None, lengths=(3, 1)) -> KnownCache:
    return KnownCache(len(lengths), capacity, np.array(lengths))


@pytest.mark.parametrize("mask", [None, rows("1", "1"), rows("1111", "0011")])
def test_a_cached_step_takes_no_mask_its_own_or_one_of_all_columns(mask):
    check_inputs(CONFIG, input_ids=tokens(2, 1), attention_mask=mask, cache=cache(capacity=4))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (dict(input_ids=tokens(3, 1)), "past_key_values: expected a cache of 3 rows, got 2"),
        (
            dict(input_ids=tokens(2, 9)),
            "sequence: expected at most max_position_embeddings = 11 real tokens a row, got 12",
        ),
        (
            dict(input_ids=tokens(2, 2)),
            "past_key_values: its capacity is 4 tokens a row, this call needs 5",
        ),
        (
            dict(input_ids=tokens(2, 2), attention_mask=rows("1", "1")),
            "attention_mask: expected shape (2, 2), or with the columns already cached before these 2, got (2, 1)",
        ),
        (
            dict(input_ids=tokens(2, 1), attention_mask=rows("1111", "0111")),
            "attention_mask: its columns before the last 1 hold [3, 2] real tokens, the cache holds [3, 1]",
        ),
    ],
)
def test_what_does_not_fit_the_cache_is_refused(arguments, line):
    assert problems_of(cache=cache(capacity=4), **arguments) == (line,)


def test_a_cache_that_grows_has_no_capacity_to_exceed():
    check_inputs(CONFIG, input_ids=tokens(2, 8), cache=cache())


def test_a_cache_of_unknown_lengths_is_checked_by_its_rows_alone():
    check_inputs(CONFIG, input_ids=tokens(2, 8), cache=KnownCache(2, 4))
    assert problems_of(input_ids=tokens(3, 8), cache=KnownCache(2, 4))[0].startswith(
        "past_key_values: expected a cache"
    )


# -- labels -----------------------------------------------------------------------------------------------------------


def label_problems(labels, shape, classes) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        check_labels("labels", labels, shape, classes)
    return caught.value.problems


@pytest.mark.parametrize(
    ("labels", "shape", "classes", "lines"),
    [
        (known([1, 2, 3]), (2, 3), 5, ("labels: expected shape (2, 3), got (3,)",)),
        (known([1, 2, 3]), (2,), 5, ("labels: expected shape (2,), got (3,)",)),
        (known([1.0]), (1,), 5, ("labels: expected an integer dtype, got float64",)),
        (known([5, -1]), (2,), 5, ("labels: expected 0 to 4, or -100 to ignore, got 5",)),
        (known([-1]), (1,), 5, ("labels: expected 0 to 4, or -100 to ignore, got -1",)),
        (
            known([7]),
            (2,),
            5,
            ("labels: expected shape (2,), got (1,)", "labels: expected 0 to 4, or -100 to ignore, got 7"),
        ),
    ],
)
def test_wrong_labels_are_named_with_what_was_expected_and_got(labels, shape, classes, lines):
    assert label_problems(labels, shape, classes) == lines


def test_right_labels_pass_as_do_numbers_where_no_classes_are_asked_for():
    check_labels("labels", known([0, 4, -100]), (3,), 5)
    check_labels("labels", known([0.5, -7.0]), (2,), None)
    check_labels("labels", Known((None, 3), "int32"), (2, 3), 5)


# -- choices ----------------------------------------------------------------------------------------------------------


def test_a_choice_outside_the_list_is_refused():
    check_choice("attn_implementation", "eager", ("eager", "sdpa"))
    with pytest.raises(InputError, match="attn_implementation: expected one of eager, sdpa, got 'flash'"):
        check_choice("attn_implementation", "flash", iter(("eager", "sdpa")))


# -- head masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5), (5,)])
def test_a_mask_of_heads_has_a_number_for_each_or_for_each_of_all_layers(shape):
    for dtype in ("float32", "bfloat16", "int64", "bool"):
        check_head_mask(Known(shape, dtype), CONFIG)
    check_inputs(CONFIG, input_ids=tokens(), head_mask=known(np.full(shape, 0.5)))


@pytest.mark.parametrize(
    ("head_mask", "line"),
    [
        (Known((5, 3), "float32"), "head_mask: expected shape (3, 5), or (5,) for all layers, got (5, 3)"),
        (Known((3,), "float32"), "head_mask: expected shape (3, 5), or (5,) for all layers, got (3,)"),
        (Known((1, 3, 5), "float32"), "head_mask: expected shape (3, 5), or (5,) for all layers, got (1, 3, 5)"),
        (Known((), "float32"), "head_mask: expected shape (3, 5), or (5,) for all layers, got ()"),
        (Known((3, 5), "complex64"), "head_mask: expected numbers, got complex64"),
        (known(np.full((3, 5), np.inf)), "head_mask: expected finite numbers, got inf in layer 0"),
    ],
)
def test_another_mask_of_heads_is_refused_beside_what_else_is_wrong(head_mask, line):
    assert problems_of(input_ids=known([[5, 97]]), head_mask=head_mask)[1:] == (line,)
    with pytest.raises(InputError, match="invalid arguments"):
        check_head_mask(head_mask, CONFIG)


def test_nothing_looks_at_the_columns_of_pruned_heads():
    head_mask = np.ones((3, 5))
    head_mask[1, 2] = np.nan
    check_head_mask(known(head_mask), CONFIG.without_heads({1: [2]}))
    with pytest.raises(InputError, match="got nan in layer 1"):
        check_head_mask(known(head_mask), CONFIG.without_heads({0: [2]}))


def test_a_cache_has_the_heads_that_each_layer_has_left():
    config = CONFIG.without_heads({1: [2]})
    cache = KnownCache(2, None, np.zeros(2, int), ((5, 7), (4, 7), (5, 7)))
    check_inputs(config, input_ids=tokens(), cache=cache)
    with pytest.raises(InputError, match="expected a cache of 4 heads of size 7 in layer 1, got 5 of size 7"):
        check_inputs(config, input_ids=tokens(), cache=cache._replace(layers=((5, 7),) * 3))
