"""Random numbers by their law, tokens by their probabilities."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_core.errors import InputError
from opt_core.sampling import (
    Uniforms,
    choose_best,
    choose_sampled,
    draw_without_replacement,
    index_of,
    log_softmax,
    softmax,
)

DRAWS = 20_000


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The statistic in standard deviations above its mean: over 6 happens by chance less than once in 10^7."""
    expected = counts.sum() * probabilities
    assert expected.min() > 5
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


# -- the law of the random numbers ------------------------------------------------------------------------------------


def test_numbers_follow_the_law_that_is_written_down():
    """Block (step, n // 4, sequence, prompt) of NumPy's Philox on the seed; this must never change."""
    uniforms = Uniforms([7], prompts=3, sequences=2)
    block = np.random.Generator(np.random.Philox(key=7, counter=[5, 0, 1, 2])).random(8)
    np.testing.assert_array_equal(uniforms.at(5, 5), block[:4])  # row 5: prompt 2, sequence 1
    np.testing.assert_array_equal(uniforms.at(5, 6), block[4:])  # the next step: the next block
    more = np.random.Generator(np.random.Philox(key=7, counter=[5, 1, 1, 2])).random(3)
    np.testing.assert_array_equal(uniforms.at(5, 5, 7), [*block[:4], *more])
    want = [0.8720734548204873, 0.29536538151378355, 0.4200976785072422, 0.4053922457839946]
    assert Uniforms([7], 1).at(0, 0).tolist() == want


def test_rows_and_steps_have_numbers_of_their_own():
    uniforms = Uniforms([0], 5, 3)
    numbers = np.array([uniforms.at(row, step) for row in range(15) for step in range(11)])
    assert len(np.unique(numbers)) == numbers.size
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_a_prompt_with_its_own_seed_has_the_numbers_that_it_has_alone():
    batch, alone = Uniforms([3, 8, 5], 3, 2), Uniforms([8], 1, 2)
    for sequence in range(2):
        np.testing.assert_array_equal(batch.at(2 + sequence, 4), alone.at(sequence, 4))
    np.testing.assert_array_equal(Uniforms([3], 7).at(0, 2), Uniforms([3], 1).at(0, 2))


def test_numbers_are_uniform():
    uniforms = Uniforms([1], 1)
    numbers = np.array([uniforms.at(0, step) for step in range(DRAWS // 10)])
    for k in range(4):
        assert chi_square(np.bincount((numbers[:, k] * 10).astype(int), minlength=10), np.full(10, 0.1)) < 6


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_sampled_tokens_follow_the_softmax():
    scores = (np.random.default_rng(0).standard_normal(31) * 1.2).astype(np.float32)
    scores[[3, 17]] = -np.inf
    rows = np.tile(scores, (DRAWS, 1))
    tokens = choose_sampled(rows, np.random.default_rng(1).random(DRAWS), np.ones(DRAWS, bool))
    counts = np.bincount(tokens, minlength=31)
    assert counts[3] == counts[17] == 0
    left = scores > -np.inf
    assert chi_square(counts[left], softmax(scores)[left]) < 6


def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_number():
    scores = np.log(np.array([[0.25, 0.0001, 0.25, 0.5]], np.float32))
    scores[0, 1] = -np.inf
    for uniform, token in [(0, 0), (0.249, 0), (0.251, 2), (0.499, 2), (0.501, 3), (1 - 2**-53, 3)]:
        assert choose_sampled(scores, np.array([uniform]), np.array([True])).tolist() == [token]


def test_rounding_of_the_logits_moves_hardly_any_token():
    """What makes the same seed write the same text in three frameworks."""
    rng = np.random.default_rng(2)
    scores = (rng.standard_normal((2000, 503)) * 2).astype(np.float32)
    numbers, live = rng.random(2000), np.ones(2000, bool)
    rounded = scores * (1 + rng.standard_normal(scores.shape).astype(np.float32) * 2e-7)
    assert (choose_sampled(scores, numbers, live) != choose_sampled(rounded, numbers, live)).sum() <= 2


def test_the_best_token_is_the_first_of_equals():
    assert choose_best(np.array([[1, 3, 3, 2], [5, 5, 5, 5]], np.float32), np.ones(2, bool)).tolist() == [1, 0]


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_row_without_a_token_is_an_error_unless_it_has_ended(value):
    scores = np.array([[1, 2], [value, value]], np.float32)
    for choose in (lambda live: choose_best(scores, live), lambda live: choose_sampled(scores, np.zeros(2), live)):
        with pytest.raises(InputError, match="row 1: the options and processors leave no token"):
            choose(np.array([True, True]))
        assert choose(np.array([True, False]))[0] in (0, 1)


@given(st.lists(st.sampled_from([0.0, 1e-300, 0.1, 1.0, 7.0]), min_size=1, max_size=6), st.floats(0, 1 - 2**-53))
def test_an_index_of_weight_zero_is_never_found(weights, uniform):
    if any(weights):
        assert weights[index_of(np.array(weights), uniform)] > 0


# -- without replacement ----------------------------------------------------------------------------------------------


def test_draws_without_replacement_follow_their_law():
    """P(first i, then j) = p_i p_j / (1 - p_i)."""
    p = np.array([0.1, 0.4, 0.2, 0.3])
    numbers = np.random.default_rng(4).random((DRAWS, 2))
    pairs = np.array([draw_without_replacement(p * 5, row) for row in numbers])
    counts = np.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16).reshape(4, 4)
    assert np.diag(counts).sum() == 0
    law = p[:, None] * p / (1 - p[:, None])
    others = ~np.eye(4, dtype=bool)
    assert chi_square(counts[others], law[others]) < 6


@given(st.lists(st.sampled_from([0.0, 1e-9, 0.3, 1.0]), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_draws_without_replacement_are_different_and_as_many_as_there_are(weights, random):
    weights = np.array(weights)
    if weights.any():
        numbers = np.array([random.choice([0.0, random.random(), 1 - 2**-53]) for _ in range(5)])
        drawn = draw_without_replacement(weights, numbers)
        assert len(set(drawn.tolist())) == len(drawn) == min(5, np.count_nonzero(weights))
        assert (weights[drawn] > 0).all()


def test_softmaxes_agree_with_their_definition():
    scores = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32) * 20
    want = np.exp(scores.astype(np.float64)) / np.exp(scores.astype(np.float64)).sum(-1, keepdims=True)
    np.testing.assert_allclose(softmax(scores), want, rtol=1e-12)
    np.testing.assert_allclose(log_softmax(scores), np.log(want), rtol=1e-6, atol=1e-6)
    assert log_softmax(scores).dtype == np.float32
