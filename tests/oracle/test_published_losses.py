"""Losses, gradients and task heads against the published PyTorch classes, where those are right.

The published language-model loss is computed in float32 whatever the model's dtype, so 1e-6 is as close as it can be.
"""

import numpy as np
import pytest
from harness import VARIANTS, config_of, rounded_weights, token_ids, worst_row
from published_models import our_model, published_model, torch

from opt_core.schema import published_name, shapes

RIGHT = np.array([[int(c) for c in row] for row in ("1111111", "1111100", "1110000")])
LEFT = RIGHT[:, ::-1].copy()
TASKS_WITH_LABELS = {"single_label_classification": 3, "multi_label_classification": 3, "regression": 1}


def padded(config, mask) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with the padding id where the mask is 0, and labels with -100 there."""
    ids = np.where(mask, token_ids(config, *mask.shape), config.pad_token_id or 0)
    return ids, np.where(mask, ids, -100)


def published_loss_and_gradients(config, task="causal-lm", **inputs):
    model = published_model(config, task)
    loss = model(**{name: torch.tensor(x) for name, x in inputs.items()}).loss
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {name: parameters[published_name(name, task)].grad for name in shapes(config, task)}
    return loss.item(), {name: np.zeros(1) if g is None else g.numpy() for name, g in gradients.items()}


def assert_gradients_agree(ours, published):
    assert ours.keys() == published.keys()
    largest = max(np.abs(g).max() for g in published.values())
    for name, gradient in published.items():
        assert np.abs(ours[name] - gradient).max() <= 1e-5 * max(np.abs(gradient).max(), 2e-2 * largest), name


# -- the language model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_of_a_right_padded_batch_are_the_published_ones(backend, variant):
    config = config_of(variant)
    ids, labels = padded(config, RIGHT)
    inputs = dict(input_ids=ids, attention_mask=RIGHT, labels=labels)
    published_loss, published = published_loss_and_gradients(config, **inputs)
    loss, gradients = backend.loss_and_gradients(our_model(backend, variant), **inputs)
    assert np.isclose(loss, published_loss, rtol=1e-6)
    assert_gradients_agree(gradients, published)


@pytest.mark.parametrize("variant", ["pre-norm", "350m style", "untied head"])
def test_loss_and_gradients_of_a_left_padded_batch_are_the_published_ones_without_the_first_label(backend, variant):
    """The first real label is left out: the published loss predicts it from the last row of padding (see below)."""
    config = config_of(variant)
    ids, labels = padded(config, LEFT)
    labels[np.arange(len(LEFT)), LEFT.argmax(1)] = -100
    inputs = dict(input_ids=ids, attention_mask=LEFT, labels=labels)
    published_loss, published = published_loss_and_gradients(config, **inputs)
    loss, gradients = backend.loss_and_gradients(our_model(backend, variant), **inputs)
    assert np.isclose(loss, published_loss, rtol=1e-6)
    assert_gradients_agree(gradients, published)


def test_a_label_that_the_published_loss_predicts_from_padding_is_not_counted(backend):
    """Published defect: rows of padding attend to all tokens, and the first real label is predicted from one of them.

    The published TensorFlow and PyTorch classes differ here from one another; ours follow the reference, which gives
    a left-padded batch the loss that its rows have alone.
    """
    config, model = config_of(), our_model(backend, "pre-norm")
    ids, labels = padded(config, LEFT)
    loss = float(model(ids, LEFT, labels=labels).loss)
    published_loss, _ = published_loss_and_gradients(config, input_ids=ids, attention_mask=LEFT, labels=labels)
    right_ids, right_labels = padded(config, RIGHT)
    for row, count in enumerate(RIGHT.sum(1)):
        right_ids[row, :count] = right_labels[row, :count] = ids[row, LEFT[row] == 1]
    assert np.isclose(loss, float(model(right_ids, RIGHT, labels=right_labels).loss), rtol=1e-6)
    assert abs(loss - published_loss) > 1e-3


def test_a_real_token_with_the_padding_id_learns_although_the_published_one_does_not(backend):
    """Published peculiarity of PyTorch alone: `padding_idx` cuts the gradient of that row where it is an input.

    Without it, as in the published TensorFlow and Flax classes, all gradients agree with ours.
    """
    config = config_of("untied head")
    ids = token_ids(config, 2, 5)
    ids[:, 2] = config.pad_token_id
    _, gradients = backend.loss_and_gradients(our_model(backend, "untied head"), input_ids=ids, labels=ids)
    name = "decoder.embed_tokens.weight"
    _, cut = published_loss_and_gradients(config, input_ids=ids, labels=ids)
    assert not cut[name][config.pad_token_id].any()
    assert np.abs(gradients[name][config.pad_token_id]).max() > 1e-4
    model = published_model(config)
    model.model.decoder.embed_tokens.padding_idx = None
    model(torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
    parameters = dict(model.named_parameters())
    whole = {name: parameters[published_name(name)].grad.numpy() for name in shapes(config)}
    assert_gradients_agree(gradients, whole)


def test_a_batch_without_any_label_has_no_loss_where_the_published_one_is_nan(backend):
    ids = token_ids(config_of(), 2, 5)
    published_loss, _ = published_loss_and_gradients(config_of(), input_ids=ids, labels=np.full_like(ids, -100))
    assert np.isnan(published_loss)
    assert float(our_model(backend, "pre-norm")(ids, labels=np.full_like(ids, -100)).loss) == 0


# -- sequence classification ------------------------------------------------------------------------------------------


def labels_for(problem_type: str, rows: int, count: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    if problem_type == "single_label_classification":
        return generator.integers(0, count, rows)
    if problem_type == "multi_label_classification":
        return generator.integers(0, 2, (rows, count)).astype(np.float32)
    return generator.standard_normal(rows if count == 1 else (rows, count)).astype(np.float32)


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("problem_type", TASKS_WITH_LABELS)
@pytest.mark.parametrize("variant", ["pre-norm", "350m style"])
def test_classification_is_the_published_one(backend, variant, problem_type, mask):
    labels_count = TASKS_WITH_LABELS[problem_type]
    config = config_of(variant, num_labels=labels_count)
    ids, _ = padded(config, mask)
    labels = labels_for(problem_type, len(ids), labels_count)
    task, inputs = "sequence-classification", dict(input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        published = published_model(config, task)(**{name: torch.tensor(x) for name, x in inputs.items()})
    model = our_model(backend, variant, task, num_labels=labels_count)
    assert worst_row(backend.numpy(model(**inputs).logits), published.logits.numpy()) <= 64 * 2.0**-24
    published_labels = labels if labels.dtype == np.int64 else labels.astype(np.float64)
    published_loss, gradients = published_loss_and_gradients(config, task, **inputs, labels=published_labels)
    loss, ours = backend.loss_and_gradients(model, task, **inputs, labels=labels)
    assert np.isclose(loss, published_loss, rtol=1e-6)
    assert_gradients_agree(ours, gradients)


def test_regression_onto_several_numbers_is_the_published_one(backend):
    config = config_of(num_labels=3, problem_type="regression")
    ids, labels = token_ids(config, 3, 7), labels_for("regression", 3, 3)
    task = "sequence-classification"
    published_loss, _ = published_loss_and_gradients(config, task, input_ids=ids, labels=labels.astype(np.float64))
    model = our_model(backend, "pre-norm", task, num_labels=3, problem_type="regression")
    assert np.isclose(float(model(ids, labels=labels).loss), published_loss, rtol=1e-6)


def test_classification_without_a_mask_finds_padding_by_its_id_as_published(backend):
    config = config_of(num_labels=3)
    ids, _ = padded(config, RIGHT)
    task = "sequence-classification"
    with torch.no_grad():
        published = published_model(config, task)(torch.tensor(ids)).logits.numpy()
    logits = backend.numpy(our_model(backend, "pre-norm", task, num_labels=3)(ids).logits)
    assert worst_row(logits, published) <= 64 * 2.0**-24


def test_classification_reads_a_real_token_that_has_the_padding_id(backend):
    """Published defect: the mask is not consulted, so a last real token equal to `pad_token_id` is skipped."""
    config, task = config_of(num_labels=3), "sequence-classification"
    ids = token_ids(config, 2, 5)
    ids[:, -1] = config.pad_token_id
    mask = np.ones_like(ids)
    model, reference_row = our_model(backend, "pre-norm", task, num_labels=3), our_model(backend, "pre-norm", "base")
    with torch.no_grad():
        published = published_model(config, task)(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    logits = backend.numpy(model(ids, mask).logits)
    last = backend.numpy(reference_row(ids, mask).last_hidden_state)[:, -1]
    expected = last @ rounded_weights(config, task)["score.weight"].T.astype(np.float64)
    assert worst_row(logits, expected) <= 64 * 2.0**-24
    assert worst_row(logits, published) > 1e-3


# -- question answering -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["pre-norm", "350m style"])
def test_answers_are_the_published_ones(backend, variant):
    config, task = config_of(variant), "question-answering"
    ids = token_ids(config, 3, 7)
    inputs = dict(input_ids=ids, start_positions=np.array([0, 3, 6]), end_positions=np.array([2, 9, 6]))
    model = our_model(backend, variant, task)
    with torch.no_grad():
        published = published_model(config, task)(torch.tensor(ids))
    out = model(ids)
    for name in ("start_logits", "end_logits"):
        assert worst_row(backend.numpy(getattr(out, name)), getattr(published, name).numpy()) <= 64 * 2.0**-24
    published_loss, published_gradients = published_loss_and_gradients(config, task, **inputs)
    loss, gradients = backend.loss_and_gradients(model, task, **inputs)
    assert np.isclose(loss, published_loss, rtol=1e-6)
    assert_gradients_agree(gradients, published_gradients)


def test_answers_in_a_padded_batch_are_the_published_ones_at_real_tokens(backend):
    """Only there: the published softmax runs over rows of padding too, so its loss depends on the padding."""
    config, task = config_of(), "question-answering"
    ids, _ = padded(config, LEFT)
    with torch.no_grad():
        published = published_model(config, task)(torch.tensor(ids), attention_mask=torch.tensor(LEFT))
    out, real = our_model(backend, "pre-norm", task)(ids, LEFT), LEFT.astype(bool)
    for name in ("start_logits", "end_logits"):
        mine, theirs = backend.numpy(getattr(out, name))[real], getattr(published, name).numpy()[real]
        assert np.linalg.norm(mine - theirs) <= 64 * 2.0**-24 * np.linalg.norm(theirs)
