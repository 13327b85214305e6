"""Laws of the rules of logits, and the points where they are not those of transformers (compared in tests/oracle)."""

import time

import numpy as np
import pytest
from harness import config_of
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_stepper import request_of

from opt_core import logits_cuts as cuts
from opt_core.errors import InputError
from opt_core.logits_pipeline import apply_rules
from opt_core.prefix import Prefix, prefix_of
from opt_core.sampling import softmax

VOCABULARY = 97
EVERY_RULE = dict(
    sequence_bias=[[[7], 2.5], [[8, 9], -3.0]], repetition_penalty=1.7, no_repeat_ngram_size=2,
    bad_words_ids=[[10, 11], [12]], exponential_decay_length_penalty=(0, 1.4), suppress_tokens=[30],
    temperature=0.8, top_k=40, top_p=0.9, min_p=0.001, typical_p=0.95, epsilon_cutoff=1e-4, eta_cutoff=1e-4,
    renormalize_logits=True, do_sample=True,
)  # fmt: skip


def rules_of(columns: int, rows: int = 1, **options):
    return request_of(config_of(), np.full((rows, columns), 4), **options).rules


def random_scores(rows: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, VOCABULARY)) * 2).astype(np.float32)


def whole(ids) -> Prefix:
    """Texts without padding."""
    ids = np.array(ids)
    return prefix_of(ids, np.ones(ids.shape, bool), 1)


# -- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0, 1, 1]])
def test_padding_is_no_part_of_a_text_wherever_it_stands(mask):
    """transformers 4.57.6 penalises the padding id as repeated, and finds n-grams in padding."""
    mask, text = np.array([mask]) == 1, [8, 7, 10, 8, 7]
    ids = np.ones((1, 8), int)
    ids[mask] = text
    padded = prefix_of(ids, mask, 1)
    assert padded.text(0).tolist() == text
    scores = random_scores(1)
    scores[0, [1, 7]] = 9.0  # the padding id is likely
    want = apply_rules(rules_of(5, **EVERY_RULE), whole([text]), scores.copy())
    got = apply_rules(rules_of(8, **EVERY_RULE), padded, scores.copy())
    np.testing.assert_array_equal(got, want)
    assert np.isfinite(got[0, 1])


def test_a_row_is_treated_as_it_would_be_alone():
    ids = np.random.default_rng(1).integers(5, 13, (6, 9))
    scores = random_scores(6)
    together = apply_rules(rules_of(9, 6, **EVERY_RULE), whole(ids), scores.copy())
    for row in range(6):
        alone = apply_rules(rules_of(9, **EVERY_RULE), whole(ids[row, None]), scores[row, None].copy())
        np.testing.assert_array_equal(alone[0], together[row])


# -- sequences --------------------------------------------------------------------------------------------------------


def test_a_sequence_applies_as_soon_as_all_but_its_last_token_are_there():
    """transformers 4.57.6 ignores it in a text that has no more tokens than that."""
    scores = random_scores(1)
    biased = apply_rules(rules_of(1, sequence_bias=[[[5, 6], 2.0], [[4, 5, 6], 7.0]]), whole([[5]]), scores.copy())
    assert biased[0, 6] == scores[0, 6] + np.float32(2)
    banned = apply_rules(rules_of(1, bad_words_ids=[[5, 6]]), whole([[5]]), scores.copy())
    assert np.flatnonzero(banned[0] != scores[0]).tolist() == [6]


def test_padding_is_never_part_of_a_sequence():
    padded = prefix_of(np.array([[1, 5]]), np.array([[False, True]]), 1)
    scores = random_scores(1)
    same = apply_rules(rules_of(2, sequence_bias=[[[1, 5, 6], 2.0]]), padded, scores.copy())
    np.testing.assert_array_equal(same, scores)


def test_the_first_token_of_the_vocabulary_can_be_biased():
    """transformers 4.57.6 refuses it in a list."""
    scores = random_scores(1)
    assert apply_rules(rules_of(1, sequence_bias=[[[0], 2.0]]), whole([[5]]), scores.copy())[0, 0] > scores[0, 0]


def test_an_id_that_ends_texts_is_not_banned_as_a_bad_word():
    scores = random_scores(1)
    same = apply_rules(rules_of(1, bad_words_ids=[[2]]), whole([[5]]), scores.copy())
    np.testing.assert_array_equal(same, scores)


@settings(deadline=None)  # a busy machine may pause between two lines
@given(st.lists(st.integers(5, 8), min_size=1, max_size=12), st.integers(1, 4))
def test_a_token_is_banned_exactly_when_its_n_gram_stands_in_the_text(text, size):
    scores = np.zeros((1, VOCABULARY), np.float32)
    banned = apply_rules(rules_of(1, no_repeat_ngram_size=size), whole([text]), scores)[0] == -np.inf
    ngrams = {tuple(text[i : i + size]) for i in range(len(text) - size + 1)}
    end = tuple(text[len(text) - size + 1 :]) if size > 1 else ()
    for token in range(5, 9):
        assert banned[token] == ((*end, token) in ngrams and len(text) >= size)


# -- what a caller adds -----------------------------------------------------------------------------------------------


def test_a_processor_sees_right_aligned_ids_and_its_scores_count():
    seen = []

    def ban(ids, scores):
        seen.append(ids.tolist())
        return np.where(np.arange(VOCABULARY) == ids[:, -1:], -np.inf, scores)

    prefix = prefix_of(np.array([[5, 6, 1], [7, 8, 9]]), np.array([[1, 1, 0], [1, 1, 1]], bool), 1)
    got = apply_rules(rules_of(3, 2, logits_processor=[ban]), prefix, random_scores(2))
    assert seen == [[[1, 5, 6], [7, 8, 9]]]
    assert np.argwhere(got == -np.inf).tolist() == [[0, 6], [1, 9]]
    assert got.dtype == np.float32


def test_processors_of_the_caller_come_before_the_cuts_of_sampling():
    rules = rules_of(1, do_sample=True, top_k=1, logits_processor=[lambda ids, scores: -scores])
    scores = random_scores(1)
    assert apply_rules(rules, whole([[5]]), scores.copy()).argmax() == scores.argmin()


def test_a_processor_that_returns_another_shape_is_named():
    rules = rules_of(1, logits_processor=[lambda ids, scores: scores[:, :5]])
    with pytest.raises(InputError, match=r"logits_processor: expected scores of shape \(1, 97\), got \(1, 5\)"):
        apply_rules(rules, whole([[5]]), random_scores(1))


def test_only_allowed_tokens_are_left_and_each_prompt_has_its_own():
    def allowed(prompt, ids):
        return [prompt + 10, int(ids[-1])]

    rules = rules_of(1, 2, num_beams=2, prefix_allowed_tokens_fn=allowed)
    beams = whole([[5], [6], [7], [8]])._replace(prompts_R=np.array([0, 0, 1, 1]))
    got = apply_rules(rules, beams, random_scores(4))
    left = [np.flatnonzero(row > -np.inf).tolist() for row in got]
    assert left == [[5, 10], [6, 10], [7, 11], [8, 11]]
    with pytest.raises(InputError, match="no token allowed for prompt 0"):
        apply_rules(rules_of(1, prefix_allowed_tokens_fn=lambda prompt, ids: []), whole([[5]]), random_scores(1))


# -- cuts -------------------------------------------------------------------------------------------------------------


def nucleus(scores_V: np.ndarray, p: float) -> set[int]:
    """By definition, where no two scores are equal: the likeliest tokens until their probabilities exceed p."""
    order = np.argsort(-scores_V)
    before = np.cumsum(softmax(scores_V)[order]) - softmax(scores_V)[order]
    return set(order[before < p].tolist())


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("p", [0.02, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_smallest_set_that_reaches_p(p, spread):
    scores = (np.random.default_rng(3).standard_normal((5, 997)) * spread).astype(np.float32)
    scores[:, ::7] = -np.inf
    got = cuts.TopP(p)(whole([[5]] * 5), scores.copy())
    for row in range(5):
        assert set(np.flatnonzero(got[row] > -np.inf).tolist()) == nucleus(scores[row], p)


CUTS = [
    cuts.TopK(2), cuts.TopP(0.5), cuts.TopP(0.0), cuts.MinP(1.0), cuts.Typical(0.3), cuts.Epsilon(0.4), cuts.Eta(0.9),
]  # fmt: skip


@pytest.mark.parametrize("cut", CUTS, ids=repr)
def test_tokens_with_equal_scores_go_or_stay_together(cut):
    """transformers 4.57.6 lets an unstable sort choose among them (top_p, min_p)."""
    scores = np.array([[1, 3, 3, 3, 0, 1], [2, 2, 2, 2, 2, 2]], np.float32)
    left = cut(whole([[5]] * 2), scores.copy()) > -np.inf
    for row in range(2):
        for score in np.unique(scores[row]):
            assert len(set(left[row, scores[row] == score].tolist())) == 1
    assert left.any(1).all()


@pytest.mark.parametrize("cut", [type(c)(*list(vars(c).values())[:1], keep=4) for c in CUTS], ids=repr)
def test_as_many_tokens_are_left_as_must_be_kept(cut):
    left = cut(whole([[5]] * 3), random_scores(3) * 5) > -np.inf
    assert (left.sum(1) >= 4).all()


@pytest.mark.parametrize("cut", CUTS, ids=repr)
def test_what_was_banned_stays_banned(cut):
    scores = random_scores(3)
    scores[:, 5:] = -np.inf
    assert (cut(whole([[5]] * 3), scores)[:, 5:] == -np.inf).all()


@pytest.mark.slow
def test_top_k_and_top_p_take_less_than_a_millisecond_a_row():
    rules = rules_of(1, do_sample=True, top_k=50, top_p=0.9, temperature=0.8)
    scores = (np.random.default_rng(0).standard_normal((8, 50272)) * 3).astype(np.float32)
    prefix, seconds = whole([[5]] * 8), []
    for _ in range(20):
        copied = scores.copy()
        begin = time.perf_counter()
        apply_rules(rules, prefix, copied)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 8e-3
