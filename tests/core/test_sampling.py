"""Random numbers by their law, tokens by their probabilities."""

import numpy as np
import pytest

from opt_core.errors import InputError
from opt_core.sampling import Noise, choose_best, choose_sampled, largest, log_softmax, softmax

DRAWS = 20_000


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The statistic in standard deviations above its mean: over 6 happens by chance less than once in 10^7."""
    expected = counts.sum() * probabilities
    assert expected.min() > 5
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


# -- the law of the random numbers ------------------------------------------------------------------------------------


def test_numbers_follow_the_law_that_is_written_down():
    """The first V doubles of NumPy's Philox on the seed from (0, step, sequence, prompt). This must never change."""
    noise = Noise([7], prompts=3, sequences=2)
    want = np.random.Generator(np.random.Philox(key=7, counter=(0, 5, 1, 2))).random(11)
    np.testing.assert_array_equal(noise.at(5, 5, np.arange(11)), want)
    np.testing.assert_array_equal(noise.at(5, 5, np.array([2, 7])), want[[2, 7]])  # row 5: prompt 2, sequence 1
    want = [0.8720734548204873, 0.29536538151378355, 0.4200976785072422, 0.4053922457839946]
    assert Noise([7], 1).at(0, 0, np.arange(4)).tolist() == want


def test_rows_and_steps_have_numbers_of_their_own():
    noise = Noise([0], 5, 3)
    numbers = np.array([noise.at(row, step, np.arange(13)) for row in range(15) for step in range(11)])
    assert len(np.unique(numbers)) == numbers.size
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_a_prompt_with_its_own_seed_has_the_numbers_that_it_has_alone():
    batch, alone, tokens = Noise([3, 8, 5], 3, 2), Noise([8], 1, 2), np.arange(9)
    for sequence in range(2):
        np.testing.assert_array_equal(batch.at(2 + sequence, 4, tokens), alone.at(sequence, 4, tokens))
    np.testing.assert_array_equal(Noise([3], 7).at(0, 2, tokens), Noise([3], 1).at(0, 2, tokens))


def test_numbers_are_uniform_over_tokens_steps_and_rows():
    noise = Noise([1], 40, 2)
    numbers = np.array([[noise.at(row, step, np.arange(7)) for step in range(40)] for row in range(80)])
    assert chi_square(np.bincount((numbers.ravel() * 10).astype(int), minlength=10), np.full(10, 0.1)) < 6
    cells = (numbers[:, 1:, :1] * 5).astype(int) * 5 + (numbers[:, :-1, :1] * 5).astype(int)  # a step and the next
    assert chi_square(np.bincount(cells.ravel(), minlength=25), np.full(25, 0.04)) < 6


# -- tokens -----------------------------------------------------------------------------------------------------------


def sampled(scores_V: np.ndarray, draws: int, seed: int = 1) -> np.ndarray:
    """The tokens of many rows with the same scores."""
    rows = np.broadcast_to(scores_V, (draws, len(scores_V)))
    return choose_sampled(rows, Noise([seed], draws), 3, np.ones(draws, bool))


def test_sampled_tokens_follow_the_softmax():
    scores = (np.random.default_rng(0).standard_normal(31) * 1.2).astype(np.float32)
    scores[[3, 17]] = -np.inf
    counts = np.bincount(sampled(scores, DRAWS), minlength=31)
    assert counts[3] == counts[17] == 0
    left = scores > -np.inf
    assert chi_square(counts[left], softmax(scores)[left]) < 6


def test_the_two_largest_are_drawn_without_replacement():
    """P(first i, then j) = p_i p_j / (1 - p_i)."""
    p = np.array([0.1, 0.4, 0.2, 0.3])
    noise = Noise([4], DRAWS)
    pairs = np.array([noise.drawn([row], 0, np.log(p)[None] - 3, 2) for row in range(DRAWS)])
    counts = np.bincount(pairs @ [4, 1], minlength=16).reshape(4, 4)
    others = ~np.eye(4, dtype=bool)
    assert chi_square(counts[others], (p[:, None] * p / (1 - p[:, None]))[others]) < 6


def perturbed(noise: Noise, rows, step: int, scores_QV: np.ndarray) -> np.ndarray:
    """The law as it is written down, for every token."""
    numbers_QV = np.array([noise.at(row, step, np.arange(scores_QV.shape[1])) for row in rows])
    with np.errstate(divide="ignore"):
        return scores_QV - np.log(-np.log(numbers_QV))


@pytest.mark.parametrize("number", [1, 2, 11, 500])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 30.0])
@pytest.mark.parametrize("left", [1.0, 0.01])
def test_what_is_drawn_is_what_the_law_says_though_most_of_it_is_not_computed(number, spread, left):
    rng = np.random.default_rng(0)
    noise = Noise([5], 60)
    for row in range(0, 60, 3):
        rows = [row, row + 1, row + 2]
        scores = (rng.standard_normal((3, 4001)) * spread).astype(np.float32)
        scores[rng.random(scores.shape) > left] = -np.inf
        want = np.argsort(-perturbed(noise, rows, 2, scores).reshape(-1), kind="stable")[:number]
        assert noise.drawn(rows, 2, scores, number).tolist() == want.tolist()


def test_the_largest_are_in_order_and_equal_ones_in_theirs():
    values = np.round(np.random.default_rng(0).standard_normal(3001), 2).astype(np.float32)
    values[::3] = -np.inf
    for number in (1, 7, 90, 2500, 4000):
        assert largest(values, number).tolist() == np.argsort(-values, kind="stable")[:number].tolist()
    values[5:2000] = np.nan
    assert largest(values, 4).tolist() == np.argsort(-values, kind="stable")[:4].tolist()


def test_rounding_of_the_logits_moves_hardly_any_token():
    """What makes the same seed write the same text in three frameworks.

    Exaggerated here: a search in the cumulative distribution would move some 20 of these tokens.
    """
    rng = np.random.default_rng(2)
    scores = (rng.standard_normal((3000, 2003)) * 3).astype(np.float32)
    rounded = scores + rng.standard_normal(scores.shape).astype(np.float32) * 1e-4
    noise, live = Noise([2], 3000), np.ones(3000, bool)
    assert (choose_sampled(scores, noise, 0, live) != choose_sampled(rounded, noise, 0, live)).sum() <= 2


def test_the_best_token_is_the_first_of_equals():
    assert choose_best(np.array([[1, 3, 3, 2], [5, 5, 5, 5]], np.float32), np.ones(2, bool)).tolist() == [1, 0]


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_row_without_a_token_is_an_error_unless_it_has_ended(value):
    scores = np.array([[1, 2], [value, value]], np.float32)
    noise = Noise([0], 2)
    for choose in (lambda live: choose_best(scores, live), lambda live: choose_sampled(scores, noise, 0, live)):
        with pytest.raises(InputError, match="row 1: the options and processors leave no token"):
            choose(np.array([True, True]))
        assert choose(np.array([True, False]))[0] in (0, 1)


def test_softmaxes_agree_with_their_definition():
    scores = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32) * 20
    want = np.exp(scores.astype(np.float64)) / np.exp(scores.astype(np.float64)).sum(-1, keepdims=True)
    np.testing.assert_allclose(softmax(scores), want, rtol=1e-12)
    np.testing.assert_allclose(log_softmax(scores), np.log(want), rtol=1e-6, atol=1e-6)
    assert log_softmax(scores).dtype == np.float32
