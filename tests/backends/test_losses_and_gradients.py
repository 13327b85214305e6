"""Losses against the reference; gradients against float64 ones, whose forward pass is the reference's."""

import numpy as np
import pytest
from harness import (
    BATCH,
    LENGTH,
    MASKS,
    ROUNDOFF,
    config_of,
    load_backend,
    mask_named,
    reference_of,
    token_ids,
    worst_row,
)

from opt_core.reference import Reference, causal_lm_loss, classification_loss, question_answering_loss

GRADIENT_VARIANTS = ["pre-norm", "350m style", "untied head", "no biases", "galactica style"]


def labels_of(ids, mask):
    """The ids; -100 at some places, at padding too."""
    labels = np.where(np.random.default_rng(3).random(ids.shape) < 0.2, -100, ids)
    return labels if mask is None else np.where(mask == 1, labels, -100)


@pytest.mark.parametrize("variant", GRADIENT_VARIANTS)
@pytest.mark.parametrize("mask", MASKS)
def test_the_loss_of_a_language_model_equals_the_reference(backend, variant, mask):
    config = config_of(variant)
    ids, mask = token_ids(config), mask_named(mask)
    reference = reference_of(config)
    logits = reference.logits(reference(ids, mask).last_hidden_state)
    model = backend.random_model(config)
    for labels in (labels_of(ids, mask), ids):
        got = model(ids, attention_mask=mask, labels=labels).loss
        assert got.shape == ()
        assert backend.dtype_of(got) == "float32"
        assert float(got) == pytest.approx(causal_lm_loss(logits, labels, mask), rel=1e-6)


def test_a_prediction_made_at_left_padding_does_not_count(backend):
    """The token before the first real one is padding: what it predicts there changes nothing."""
    config = config_of()
    ids, mask = token_ids(config), mask_named("left")
    model = backend.random_model(config)
    ignored = np.where(mask == 1, ids, -100)
    want = float(model(ids, attention_mask=mask, labels=ignored).loss)
    ignored[0, 3] = -100  # the first real token of row 0
    assert float(model(ids, attention_mask=mask, labels=ignored).loss) == want


def test_nothing_to_predict_is_a_loss_of_zero(backend):
    model, ids = backend.random_model(config_of()), token_ids(config_of())
    assert float(model(ids, labels=np.full(ids.shape, -100)).loss) == 0
    assert float(model(ids, attention_mask=np.zeros_like(ids), labels=ids).loss) == 0
    assert float(model(ids[:, :1], labels=ids[:, :1]).loss) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_precision_model_has_a_float32_loss(backend, dtype):
    config = config_of()
    model, ids = backend.random_model(config, dtype=dtype), token_ids(config)
    out = model(ids, labels=ids)
    assert backend.dtype_of(out.loss) == "float32"
    logits = backend.numpy(out.logits)
    assert float(out.loss) == pytest.approx(causal_lm_loss(logits, ids), rel=1e-6)


@pytest.fixture(scope="module")
def float64_gradients():
    """Gradients of PyTorch in float64, after its loss was found equal to the reference's."""
    torch = pytest.importorskip("torch", reason="the float64 gradients are taken with PyTorch")
    backend = load_backend("torch")

    def gradients(config, ids, mask, labels):
        model = backend.random_model(config, attn_implementation="eager").double()
        loss, gradients = backend.loss_and_gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
        reference = reference_of(config)
        truth = causal_lm_loss(reference.logits(reference(ids, mask).last_hidden_state), labels, mask)
        assert loss == pytest.approx(truth, rel=1e-12)
        assert torch.get_default_dtype() == torch.float32
        return gradients

    return gradients


@pytest.mark.parametrize("variant", ["350m style", "untied head", "galactica style"])
def test_float64_gradients_are_finite_differences_of_the_reference(float64_gradients, variant):
    """Along a random direction of each weight: (loss(w + h d) - loss(w - h d)) / 2h, of NumPy's forward pass alone.

    Where a ReLU turns off within h, a difference is off by some h; rounding of the losses adds 1e-16 / h.
    """
    config, step = config_of(variant), 1e-6
    ids, mask = token_ids(config), mask_named("holes")
    labels = labels_of(ids, mask)
    gradients, reference = float64_gradients(config, ids, mask, labels), reference_of(config)
    chance = np.random.default_rng(0)

    def loss_at(name: str, value: np.ndarray) -> float:
        moved = Reference(config, {**reference.weights, name: value})
        return causal_lm_loss(moved.logits(moved(ids, mask).last_hidden_state), labels, mask)

    for name, gradient in gradients.items():
        direction, weight = chance.standard_normal(gradient.shape), reference.weights[name]
        there, back = (loss_at(name, weight + sign * step * direction) for sign in (1, -1))
        want = float((gradient * direction).sum())
        assert (there - back) / (2 * step) == pytest.approx(want, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", ["none", "left", "an empty row"])
@pytest.mark.parametrize("variant", GRADIENT_VARIANTS)
def test_gradients_equal_float64_ones(backend, float64_gradients, variant, mask, attn_implementation):
    config = config_of(variant)
    ids, mask = token_ids(config), mask_named(mask)
    labels = labels_of(ids, mask)
    truth = float64_gradients(config, ids, mask, labels)
    model = backend.random_model(config, attn_implementation=attn_implementation)
    _, got = backend.loss_and_gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
    assert got.keys() == truth.keys()
    largest = max(np.abs(g).max() for g in truth.values())
    for name, want in truth.items():
        error = np.linalg.norm(got[name] - want)
        assert error <= 64 * ROUNDOFF["float32"] * (np.linalg.norm(want) + largest), name


CLASSIFICATION = {
    "single_label_classification": (5, np.array([0, 4, 2, 1])),
    "regression": (1, np.array([0.5, -1.0, 2.0, 0.0], np.float32)),
    "multi_label_classification": (3, np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], np.float32)),
}


@pytest.mark.parametrize("given", [True, False], ids=["problem_type given", "problem_type inferred"])
@pytest.mark.parametrize("problem_type", CLASSIFICATION)
@pytest.mark.parametrize("mask", MASKS)
def test_sequence_classification_equals_the_reference(backend, problem_type, given, mask):
    num_labels, labels = CLASSIFICATION[problem_type]
    config = config_of("350m style", num_labels=num_labels, problem_type=problem_type if given else None)
    ids, mask = token_ids(config), mask_named(mask)
    reference = reference_of(config, "sequence-classification")
    hidden = reference(ids, mask).last_hidden_state
    truth = reference.classify(hidden, mask)
    # One label is one number, which may cancel to almost nothing: the error is held against the size of its terms.
    size = np.linalg.norm(hidden, axis=-1).max() * np.linalg.norm(reference.weights["score.weight"], axis=1).max()
    out = backend.random_model(config, "sequence-classification")(ids, attention_mask=mask, labels=labels)
    np.testing.assert_allclose(backend.numpy(out.logits), truth, atol=64 * ROUNDOFF["float32"] * size)
    assert float(out.loss) == pytest.approx(classification_loss(truth, labels, problem_type), rel=1e-5)


def test_classification_without_a_mask_finds_the_last_token_by_its_id(backend):
    config = config_of()
    model = backend.random_model(config, "sequence-classification")
    ids = token_ids(config)
    mask = mask_named("right")
    ids = np.where(mask == 1, ids, config.pad_token_id)
    np.testing.assert_allclose(
        backend.numpy(model(ids).logits), backend.numpy(model(ids, attention_mask=mask).logits), atol=1e-5
    )


def test_a_mask_outweighs_the_pad_id_in_classification(backend):
    config = config_of()
    model, ids = backend.random_model(config, "sequence-classification"), token_ids(config)
    ids[:, -1] = config.pad_token_id  # a real token that has the id of padding
    reference = reference_of(config, "sequence-classification")
    truth = reference.classify(reference(ids).last_hidden_state)
    got = backend.numpy(model(ids, attention_mask=np.ones_like(ids)).logits)
    assert worst_row(got, truth) <= 64 * ROUNDOFF["float32"]


@pytest.mark.parametrize("mask", MASKS)
def test_question_answering_equals_the_reference(backend, mask):
    config = config_of()
    ids, mask = token_ids(config), mask_named(mask)
    starts, ends = np.array([3, 0, -100, 7]), np.array([4, LENGTH + 30, 2, 8])  # some at padding
    reference = reference_of(config, "question-answering")
    start, end = reference.answer_spans(reference(ids, mask).last_hidden_state, mask)
    model = backend.random_model(config, "question-answering")
    out = model(ids, attention_mask=mask, start_positions=starts, end_positions=ends)
    np.testing.assert_allclose(backend.numpy(out.start_logits), start, atol=1e-5)
    np.testing.assert_allclose(backend.numpy(out.end_logits), end, atol=1e-5)
    assert float(out.loss) == pytest.approx(question_answering_loss(start, end, starts, ends, mask), rel=1e-5)


def test_left_padding_does_not_change_the_loss_of_question_answering(backend):
    config = config_of()
    model, ids = backend.random_model(config, "question-answering"), token_ids(config, BATCH, 9)
    starts, ends = np.array([3, 0, 8, 7]), np.array([4, 5, 8, 8])
    padded = np.concatenate([np.ones((BATCH, 4), int), ids], axis=1)
    mask = np.concatenate([np.zeros((BATCH, 4), int), np.ones_like(ids)], axis=1)
    want = model(ids, start_positions=starts, end_positions=ends).loss
    got = model(padded, attention_mask=mask, start_positions=starts + 4, end_positions=ends + 4).loss
    assert float(got) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("sequence-classification", dict(labels=[0, 1, 2, 3]), "labels: expected 0 to 1, or -100 to ignore, got 2"),
        ("sequence-classification", dict(labels=[0, 1]), r"labels: expected shape \(4,\), got \(2,\)"),
        ("question-answering", dict(start_positions=[1, 2, 3, 4]), "start_positions, end_positions: expected both"),
        (
            "question-answering",
            dict(start_positions=[1, 2, 3], end_positions=[1, 2, 3, 4]),
            r"start_positions: expected shape \(4,\), got \(3,\)",
        ),
        (
            "question-answering",
            dict(start_positions=[1, 2, 3, -1], end_positions=[1, 2, 3, 4]),
            "start_positions: expected .* or -100 to ignore, got -1",
        ),
    ],
)
def test_wrong_labels_are_refused(backend, task, labels, message):
    config = config_of()
    with pytest.raises(ValueError, match=message):
        backend.random_model(config, task)(token_ids(config), **{k: np.array(v) for k, v in labels.items()})
