"""What `generate` agrees to do: lengths, padding, ends, and refusals before anything is computed."""

import numpy as np
import pytest
from harness import config_of
from hypothesis import given
from hypothesis import strategies as st

from opt_core.checks import Known
from opt_core.errors import InputError, KeywordError
from opt_core.generation import BUCKET, DEFAULT_NEW_TOKENS, bucketed
from opt_core.generation_request import plan_request

CONFIG = config_of()  # 97 tokens, 41 positions, pad 1, bos and eos 2


def known(values) -> Known:
    values = np.asarray(values)
    return Known(values.shape, str(values.dtype), values)


def plan(ids=((5, 6, 7),), mask=None, config=CONFIG, **options):
    mask = None if mask is None else known([[int(c) for c in row] for row in mask])
    return plan_request(config, None if ids is None else known(ids), mask, **options).plan


def problems_of(*args, **options) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        plan(*args, **options)
    return caught.value.problems


# -- lengths ----------------------------------------------------------------------------------------------------------


def test_twenty_new_tokens_are_made_by_default_or_as_many_as_there_are_positions_for():
    assert plan().max_new_tokens == DEFAULT_NEW_TOKENS == 20
    assert plan([[5] * 30]).max_new_tokens == 12  # 29 more positions than 1; the last token needs none
    assert plan([[5] * 41]).max_new_tokens == 1


def test_max_length_counts_the_columns_of_the_prompt_and_yields_to_max_new_tokens():
    assert plan(max_length=10).max_new_tokens == 7
    assert plan([[1, 5, 6]], ["011"], max_length=10).max_new_tokens == 7
    assert plan(max_length=10, max_new_tokens=5).max_new_tokens == 5


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (dict(max_new_tokens=0), "max_new_tokens: expected a positive integer, got 0"),
        (dict(max_new_tokens=2.0), "max_new_tokens: expected a positive integer, got 2.0"),
        (dict(max_new_tokens=True), "max_new_tokens: expected a positive integer, got True"),
        (dict(max_length=3), "max_length: expected more than the 3 tokens of the prompt, got 3"),
        (
            dict(max_new_tokens=40),
            "max_new_tokens: the prompt leaves room for 39 new tokens (max_position_embeddings = 41), got 40",
        ),
        (
            dict(max_length=43),
            "max_length: the prompt leaves room for 39 new tokens (max_position_embeddings = 41), got 43",
        ),
        (dict(eos_token_id=97), "eos_token_id: expected an id from 0 to 96, got 97"),
        (dict(eos_token_id=[2, 98]), "eos_token_id: expected an id from 0 to 96, got 98"),
        (dict(eos_token_id="2"), "eos_token_id: expected a token id or a list of them, got '2'"),
        (dict(eos_token_id=2.5), "eos_token_id: expected a token id or a list of them, got 2.5"),
        (dict(pad_token_id=97), "pad_token_id: expected an id from 0 to 96, got 97"),
        (dict(pad_token_id="x"), "pad_token_id: expected a token id, got 'x'"),
        (dict(do_sample=3), "do_sample: expected True or False, got 3"),
        (dict(num_beams=0), "num_beams: expected a positive integer, got 0"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_expected_and_got(options, line):
    assert problems_of(**options) == (line,)


def test_all_that_is_wrong_with_a_request_is_listed_at_once():
    def names(*args, **options):
        return sorted(line.partition(":")[0] for line in problems_of(*args, **options))

    assert names([[5, 97]], num_beams=0, pad_token_id=99) == ["input_ids", "num_beams", "pad_token_id"]
    assert names([[5, 6]], num_beams=0, max_new_tokens=0) == ["max_new_tokens", "num_beams"]


def test_the_longest_text_feeds_a_token_to_every_position():
    assert plan(max_new_tokens=39).max_new_tokens == 39
    assert plan([[1, 1, 5, 6, 7]], ["00111"], max_new_tokens=39).max_new_tokens == 39


# -- padding and ends -------------------------------------------------------------------------------------------------


def test_without_a_mask_padding_is_found_by_its_id():
    asked = plan([[1, 1, 5], [5, 6, 7]])
    assert asked.real.tolist() == [[False, False, True], [True, True, True]]
    assert asked.has_padding
    assert not plan([[5, 6, 7]]).has_padding


def test_a_mask_decides_where_one_is_given():
    asked = plan([[1, 1, 5], [5, 6, 7]], ["011", "110"])
    assert asked.real.tolist() == [[False, True, True], [True, True, False]]


def test_an_id_that_ends_texts_too_is_not_taken_for_padding():
    assert plan([[2, 5, 6]], pad_token_id=2).real.all()
    assert plan([[2, 5, 6]], config=config_of("no pad id")).real.all()


def test_rows_hold_the_padding_id_of_the_call_of_the_config_or_the_end():
    assert plan(pad_token_id=9).pad_token_id == 9
    assert plan().pad_token_id == 1
    assert plan(config=config_of("no pad id")).pad_token_id == 2
    assert plan(config=config_of("no pad id", eos_token_id=None)).pad_token_id == 0


@pytest.mark.parametrize(("given_id", "ids"), [(None, (2,)), (5, (5,)), ([5, 7], (5, 7)), ((5, 7), (5, 7))])
def test_a_text_ends_at_the_ids_of_the_call_or_of_the_config(given_id, ids):
    assert plan(eos_token_id=given_id).eos_token_ids == ids


def test_a_row_without_a_real_token_cannot_be_continued():
    lines = problems_of([[5, 6], [5, 6], [5, 6]], ["11", "00", "00"])
    assert lines == ("attention_mask: row 1 has no real token", "attention_mask: row 2 has no real token")


def test_no_prompt_means_the_token_that_begins_a_text():
    assert plan(None).input_ids.tolist() == [[2]]
    assert problems_of(None, config=config_of(bos_token_id=None)) == (
        "input_ids, inputs_embeds: expected exactly one of them, got neither",
    )


# -- options ----------------------------------------------------------------------------------------------------------


def test_a_misspelt_option_is_told_what_it_may_have_meant():
    with pytest.raises(KeywordError, match="max_new_token: unknown keyword; did you mean max_new_tokens"):
        plan(max_new_token=3)


# -- buckets ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_a_bucketed_length_is_the_next_whole_number_of_buckets(length):
    assert bucketed(length) % BUCKET == 0
    assert length <= bucketed(length) < length + BUCKET


def test_the_cache_holds_the_prompt_and_all_new_tokens_in_whole_buckets():
    asked = plan([[5] * 30], max_new_tokens=12)
    assert asked.capacity == 64
    assert plan([[5] * 30], config=config_of(max_position_embeddings=101), max_new_tokens=35).capacity == 128
