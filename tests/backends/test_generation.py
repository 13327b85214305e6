"""Greedy generation against the definition: the reference's best token, one after another."""

import numpy as np
import pytest
from harness import config_of, reference_of, token_ids

LEFT = np.array([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]])


def greedy_by_definition(config, ids, mask, steps, eos=()):
    """Tokens [B, n] and the least margin between the two best logits that decided any of them."""
    reference, real = reference_of(config), mask == 1
    rows, margins = [], []
    for row in range(len(ids)):
        text = list(ids[row, real[row]])
        new = []
        while len(new) < steps and (not new or new[-1] not in eos):
            logits = reference.logits(reference(np.array([text])).last_hidden_state[:, -1:])[0, 0]
            best = np.sort(logits)[-2:]
            margins.append(best[1] - best[0])
            new.append(int(logits.argmax()))
            text.append(new[-1])
        rows.append(new)
    length = max(map(len, rows))
    return np.array([row + [config.pad_token_id] * (length - len(row)) for row in rows]), min(margins)


@pytest.mark.parametrize("variant", ["pre-norm", "350m style", "untied head", "galactica style"])
def test_a_left_padded_batch_continues_as_each_prompt_alone(backend, variant):
    config = config_of(variant, eos_token_id=None)
    ids = np.where(LEFT == 1, token_ids(config, *LEFT.shape), config.pad_token_id)
    want, margin = greedy_by_definition(config, ids, LEFT, 20)
    assert margin > 1e-4  # no ties, so equality may be asked for
    got = backend.numpy(backend.random_model(config).generate(ids, attention_mask=LEFT, max_new_tokens=20))
    np.testing.assert_array_equal(got, np.concatenate([ids, want], axis=1))


@pytest.mark.parametrize("mask", [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], [[1, 0, 1, 0, 1], [0, 1, 1, 1, 0]]])
def test_right_padding_and_holes_continue_as_the_real_tokens_alone(backend, mask):
    config, mask = config_of(eos_token_id=None), np.array(mask)
    ids = token_ids(config, *mask.shape)
    want, _ = greedy_by_definition(config, ids, mask, 7)
    got = backend.numpy(backend.random_model(config).generate(ids, attention_mask=mask, max_new_tokens=7))
    np.testing.assert_array_equal(got, np.concatenate([ids, want], axis=1))


def test_padding_is_inferred_from_its_id(backend):
    config = config_of(eos_token_id=None)
    model = backend.random_model(config)
    ids = np.where(LEFT == 1, token_ids(config, *LEFT.shape), config.pad_token_id)
    with_mask = model.generate(ids, attention_mask=LEFT, max_new_tokens=5)
    np.testing.assert_array_equal(backend.numpy(model.generate(ids, max_new_tokens=5)), backend.numpy(with_mask))


def test_a_row_that_ended_is_padded_and_all_ended_stops(backend):
    config = config_of(eos_token_id=None)
    ids = token_ids(config, 3, 4)
    free, _ = greedy_by_definition(config, ids, np.ones_like(ids), 12)
    eos = [int(free[0, 2]), int(free[1, 5]), int(free[2, 4])]
    want, _ = greedy_by_definition(config, ids, np.ones_like(ids), 30, eos)
    assert want.shape[1] < 12
    model = backend.random_model(config)
    got = backend.numpy(model.generate(ids, max_new_tokens=30, eos_token_id=eos))
    np.testing.assert_array_equal(got, np.concatenate([ids, want], axis=1))
    one = backend.numpy(model.generate(ids, max_new_tokens=12, eos_token_id=eos[0], pad_token_id=3))
    assert (one[0, 4 + np.flatnonzero(free[0] == eos[0])[0] + 1 :] == 3).all()


def test_twenty_new_tokens_by_default_and_fewer_where_positions_end(backend):
    config = config_of(eos_token_id=None)
    model = backend.random_model(config)
    assert model.generate(token_ids(config, 1, 6)).shape == (1, 26)
    assert model.generate(token_ids(config, 1, 35)).shape == (1, 42)  # 41 positions, and a last token never fed
    assert model.generate(token_ids(config, 1, 6), max_length=9).shape == (1, 9)


def test_generation_starts_from_bos_without_a_prompt(backend):
    config = config_of(eos_token_id=None)
    model = backend.random_model(config)
    from_bos = model.generate(np.array([[config.bos_token_id]]), max_new_tokens=5)
    np.testing.assert_array_equal(backend.numpy(model.generate(max_new_tokens=5)), backend.numpy(from_bos))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(max_new_tokens=36), "max_new_tokens: the prompt leaves room for 35 new tokens"),
        (dict(max_length=43), "max_length: the prompt leaves room for 35 new tokens"),
        (dict(max_new_tokens=0), "max_new_tokens: expected a positive integer, got 0"),
        (dict(max_length=7), "max_length: expected more than the 7 tokens of the prompt, got 7"),
        (dict(attention_mask=np.array([[0] * 7])), "attention_mask: row 0 has no real token"),
        (dict(num_beams=0), "num_beams: expected a positive integer, got 0"),
        (dict(assistant_model=3), "assistant_model: expected a model of this package that generates, got int"),
        (dict(max_new_token=3), "max_new_token: unknown keyword; did you mean max_new_tokens?"),
        (dict(eos_token_id=97), "eos_token_id: expected an id from 0 to 96, got 97"),
        (dict(max_new_tokens=0, num_beams=0), "2 problems"),
        (dict(input_ids={"input_ids": [[5]]}), "got {'input_ids': [[5]]}; pass what a tokenizer returned as **inputs"),
    ],
)
def test_an_impossible_request_is_refused_before_it_starts(backend, arguments, message):
    config = config_of()
    model = backend.random_model(config)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is compared below
        model.generate(**{"input_ids": token_ids(config, 1, 7), **arguments})
    assert message in str(caught.value)


def test_generation_leaves_a_training_model_in_training(backend):
    config = config_of(dropout=0.5, attention_dropout=0.5, eos_token_id=None)
    model, ids = backend.random_model(config), token_ids(config, 2, 5)
    want = backend.numpy(model.generate(ids, max_new_tokens=8))
    training = backend.train(model)
    np.testing.assert_array_equal(backend.numpy(model.generate(ids, max_new_tokens=8)), want)
    first, second = (backend.numpy(training(ids).logits) for _ in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_generates_what_its_own_full_pass_prefers(backend, dtype):
    config = config_of(eos_token_id=None)
    model, ids = backend.random_model(config, dtype=dtype), token_ids(config, 2, 5)
    text = backend.numpy(model.generate(ids, max_new_tokens=10))
    logits = backend.numpy(model(text[:, :-1]).logits)[:, 4:]
    chosen = np.take_along_axis(logits, text[:, 5:, None], axis=2)[..., 0]
    slack = 32 * {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype] * np.abs(logits).max()
    assert (chosen >= logits.max(-1) - slack).all()
