"""Every strategy gives the same text in every backend as on the float64 reference, and streams what it returns."""

import numpy as np
import pytest
from harness import config_of, reference_of
from reference_stepper import ReferenceStepper, request_of

from opt_core.errors import InputError
from opt_core.generation_options import NOT_DONE
from opt_core.searching import search

PROMPT = np.array([[1, 1, 5, 9, 23, 4], [7, 3, 8, 21, 2, 11], [1, 6, 1, 17, 1, 40]])
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1]])
STRATEGIES = {
    "sampling": dict(do_sample=True, seed=5, temperature=1.3, top_k=30, top_p=0.95),
    "several samples": dict(do_sample=True, seed=5, num_return_sequences=2, typical_p=0.9),
    "a seed for each prompt": dict(do_sample=True, seed=[3, 4, 5], min_p=0.01),
    "beams": dict(num_beams=3, num_return_sequences=2, length_penalty=0.7),
    "beam sampling": dict(num_beams=2, do_sample=True, seed=11),
    "contrastive": dict(penalty_alpha=0.6, top_k=4),
    "prompt lookup": dict(prompt_lookup_num_tokens=4),
    "rules": dict(repetition_penalty=1.7, no_repeat_ngram_size=2, bad_words_ids=[[5], [9, 23]], min_new_tokens=5),
}
LENGTH = 17


def model_of(backend, config):
    return backend.random_model(config)


def generated(backend, model, **options) -> np.ndarray:
    return np.asarray(backend.numpy(model.generate(PROMPT, MASK, max_new_tokens=LENGTH, **options))).astype(int)


def expected(config, draft: ReferenceStepper | None = None, **options) -> np.ndarray:
    request = request_of(config, PROMPT, MASK, max_new_tokens=LENGTH, **options)
    return search(request, ReferenceStepper(config, reference=reference_of(config)), draft).sequences


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_gives_the_text_of_the_reference(backend, name):
    config = config_of(eos_token_id=[2, 6])
    assert np.array_equal(
        generated(backend, model_of(backend, config), **STRATEGIES[name]), expected(config, **STRATEGIES[name])
    )


@pytest.mark.parametrize("name", ["a seed for each prompt", "beams", "contrastive"])
def test_a_left_padded_batch_continues_as_each_prompt_alone(backend, name):
    """Of the reference that holds for every strategy (tests/core), and what it writes is the text of each backend."""
    model, left = model_of(backend, config_of(eos_token_id=[2, 6])), MASK[[0, 1, 0]]
    left[2, 2:4] = 0
    options = dict(STRATEGIES[name], max_new_tokens=LENGTH)
    together = np.asarray(backend.numpy(model.generate(PROMPT, left, **options))).astype(int)
    returned = len(together) // 3
    for row in range(3):
        alone = {**options, "seed": options["seed"][row]} if "seed" in options else options
        ids = PROMPT[row : row + 1, left[row] == 1]
        text = np.asarray(backend.numpy(model.generate(ids, np.ones_like(ids), **alone))).astype(int)
        new = text[:, left[row].sum() :]
        assert np.array_equal(together[row * returned : (row + 1) * returned, 6 : 6 + new.shape[1]], new)


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, id="greedy"), pytest.param(dict(do_sample=True, seed=8), marks=pytest.mark.slow, id="sampling")],
)
def test_a_draft_model_changes_no_token(backend, options):
    config = config_of()
    model = model_of(backend, config)
    assistant = model_of(backend, config_of(num_hidden_layers=1))
    assisted = generated(backend, model, assistant_model=assistant, num_assistant_tokens=3, **options)
    assert np.array_equal(assisted, generated(backend, model, **options))


def test_a_stream_is_the_text_token_by_token(backend):
    model = model_of(backend, config_of())
    options = dict(do_sample=True, seed=2)
    tokens = list(model.stream(PROMPT, MASK, max_new_tokens=LENGTH, **options))
    assert np.array_equal(np.stack(tokens, 1), generated(backend, model, **options)[:, PROMPT.shape[1] :])
    with pytest.raises(ValueError, match="beam search does not know its text"):
        model.stream(PROMPT, MASK, num_beams=2)


def test_scores_and_logits_are_handed_out_as_arrays_of_the_framework(backend):
    model = model_of(backend, config_of())
    out = model.generate(PROMPT, MASK, max_new_tokens=4, num_beams=2, output_scores=True, output_logits=True,
                         return_dict_in_generate=True)  # fmt: skip
    plain = model.generate(PROMPT, MASK, max_new_tokens=4, num_beams=2)
    assert np.array_equal(backend.numpy(out.sequences), backend.numpy(plain))
    assert (
        type(out.sequences) is type(plain) is type(out.scores[0]) is type(out.logits[0]) is type(out.sequences_scores)
    )
    assert backend.numpy(out.logits[0]).shape == (6, model.config.vocab_size)


@pytest.mark.parametrize("name", ["greedy", "sampling", "beams", "contrastive", "prompt lookup", "rules"])
def test_scores_and_logits_of_each_step_are_those_of_the_reference(backend, name):
    config = config_of(eos_token_id=None)
    options = dict(STRATEGIES.get(name, {}), output_scores=True, output_logits=True, return_dict_in_generate=True)
    if "min_new_tokens" in options:
        options["eos_token_id"] = 96
    out = model_of(backend, config).generate(PROMPT, MASK, max_new_tokens=5, **options)
    request = request_of(config, PROMPT, MASK, max_new_tokens=5, **options)
    want = search(request, ReferenceStepper(config, reference=reference_of(config)))
    for got_n, want_n in ((out.scores, want.scores), (out.logits, want.logits)):
        assert len(got_n) == len(want_n) == 5
        for got, expected_RV in zip(got_n, want_n, strict=True):
            np.testing.assert_allclose(backend.numpy(got), expected_RV, rtol=1e-4, atol=1e-4)


@pytest.fixture
def computing(backend, monkeypatch):
    """Makes every way to compute a logit of a model an error."""

    def computed(*args, **options):
        raise AssertionError("computed")

    def forbid(model):
        stepping = __import__(f"opt_{backend.name}.stepping", fromlist=["ModelStepper"])
        monkeypatch.setattr(stepping.ModelStepper, "prefill", computed)
        for name in ("prefill", "search", "_search"):
            monkeypatch.setattr(type(model), name, computed, raising=False)

    return forbid


@pytest.mark.parametrize("name", ["greedy", *STRATEGIES])
def test_a_text_that_would_be_too_long_is_refused_before_anything_is_computed(backend, computing, name):
    model, options = model_of(backend, config_of()), STRATEGIES.get(name, {})
    computing(model)
    with pytest.raises(InputError, match=r"the prompt leaves room for 3\d new tokens"):
        model.generate(PROMPT, MASK, max_new_tokens=37, **options)
    with pytest.raises(AssertionError, match="computed"):
        model.generate(PROMPT, MASK, max_new_tokens=35, **options)


def test_what_cannot_be_honoured_is_refused_before_anything_is_computed(backend, computing):
    model = model_of(backend, config_of())
    computing(model)
    for option in NOT_DONE:
        for call in (model.generate, model.stream):
            with pytest.raises(InputError, match=f"{option}: not supported"):
                call(PROMPT, MASK, **{option: "x"})


def test_processors_and_criteria_of_the_user_are_obeyed(backend):
    model = model_of(backend, config_of())

    def only_seven(ids, scores):
        allowed = np.full_like(scores, -np.inf)
        allowed[:, 7] = 0
        return allowed

    sequences = generated(
        backend, model, logits_processor=only_seven, stopping_criteria=lambda ids, scores: ids.shape[1] >= 9
    )
    assert np.array_equal(sequences[:, PROMPT.shape[1] :], np.full((3, 3), 7))


def test_dropout_is_off_while_tokens_are_drawn_and_on_again_afterwards(backend):
    config = config_of(dropout=0.5)
    model = model_of(backend, config)
    want = generated(backend, model, do_sample=True, seed=1)
    backend.train(model)
    assert np.array_equal(generated(backend, model, do_sample=True, seed=1), want)
    assert getattr(model, "training", True)
