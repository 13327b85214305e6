"""Layers computed again for their gradients: the same numbers as without, dropout and LayerDrop included."""

import numpy as np
import pytest
from harness import ROUNDOFF, config_of, mask_named, token_ids

SEGMENTS = np.array([[3] * 5 + [8] * 8, [1] * 13, [2] * 12 + [3], [4, 4, 5, 5, 4, 4, 4, 6, 6, 6, 6, 6, 7]])
RANDOM = dict(dropout=0.3, attention_dropout=0.2, layerdrop=0.3)


def gradients_of(backend, model, **inputs):
    """In training mode, with what is dropped as the model's very first call drops it."""
    if backend.name == "torch":
        backend.torch.manual_seed(5)
        model.train()
    elif backend.name == "flax":
        model.train()
    if backend.name != "tf":
        return backend.loss_and_gradients(model, **inputs)
    model.seed_generator.state.assign([5, 0])
    return backend.loss_and_gradients(model, training=True, **inputs)


@pytest.mark.parametrize(
    ("case", "variant", "attn_implementation"),
    [
        pytest.param("plain", "350m style", "sdpa", marks=pytest.mark.slow),
        ("padding", "pre-norm", "sdpa"),
        pytest.param("documents", "pre-norm", "eager", marks=pytest.mark.slow),
        ("head mask", "pre-norm", "sdpa"),
    ],
)
def test_recomputed_layers_have_the_same_gradients(backend, case, variant, attn_implementation):
    config = config_of(variant, **RANDOM, num_hidden_layers=2)
    ids = token_ids(config)
    inputs = {
        "plain": {},
        "padding": dict(attention_mask=mask_named("an empty row")),
        "documents": dict(segment_ids=SEGMENTS),
        "head mask": dict(head_mask=np.linspace(0, 2, 10, dtype=np.float32).reshape(2, 5)),
    }[case] | dict(input_ids=ids, labels=ids)
    results = []
    for recomputes in (False, True):
        model = backend.random_model(config, attn_implementation=attn_implementation)
        if recomputes:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing is recomputes
        results.append(gradients_of(backend, model, **inputs))
    (loss, gradients), (again, others) = results
    assert again == pytest.approx(loss, rel=1e-6)
    largest = max(np.linalg.norm(gradient) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert np.linalg.norm(others[name] - gradient) <= 16 * ROUNDOFF["float32"] * largest, name


def test_checkpointing_can_be_switched_off_again(backend):
    model = backend.random_model(config_of())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_evaluation_and_caches_do_not_notice(backend):
    config = config_of()
    model, ids = backend.random_model(config), token_ids(config)
    want = model(ids, use_cache=True)
    text = backend.numpy(model.generate(ids, max_new_tokens=3))
    model.gradient_checkpointing_enable()
    out = model(ids, use_cache=True)
    np.testing.assert_array_equal(backend.numpy(out.logits), backend.numpy(want.logits))
    assert len(out.past_key_values.keys) == config.num_hidden_layers
    np.testing.assert_array_equal(backend.numpy(model.generate(ids, max_new_tokens=3)), text)
    training = backend.train(model)
    cached = training(ids, use_cache=True)
    np.testing.assert_allclose(backend.numpy(cached.logits), backend.numpy(want.logits), atol=1e-5)
    np.testing.assert_allclose(
        backend.numpy(cached.past_key_values.keys[1]), backend.numpy(want.past_key_values.keys[1]), atol=1e-5
    )


@pytest.mark.parametrize("recomputes", [False, True])
def test_skipped_layers_leave_every_output_in_its_place(backend, recomputes):
    config = config_of(layerdrop=1.0)
    model, ids = backend.random_model(config), token_ids(config)
    if recomputes:
        model.gradient_checkpointing_enable()
    training = backend.train(model)
    out = training(ids, use_cache=True, output_hidden_states=True)
    L = config.num_hidden_layers
    assert len(out.hidden_states) == L + 1
    assert len(out.past_key_values.keys) == len(out.past_key_values.values) == L
    assert all(backend.numpy(x).shape == (4, 5, 13, 7) for x in out.past_key_values.keys)
    np.testing.assert_array_equal(backend.numpy(out.hidden_states[0]), backend.numpy(out.hidden_states[L - 1]))
    attentions = training(ids, use_cache=False, output_attentions=True).attentions
    assert [backend.numpy(x).shape for x in attentions] == [(4, 5, 13, 13)] * L
