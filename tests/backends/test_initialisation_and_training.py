"""Fresh models, and what only training does: dropout, LayerDrop."""

import math

import numpy as np
import pytest
from harness import VARIANTS, config_of, token_ids

from opt_core import OPTConfig
from opt_core.schema import weights

WIDE = dict(vocab_size=499, hidden_size=96, num_attention_heads=4, ffn_dim=389, word_embed_proj_dim=67)


def test_a_fresh_model_is_distributed_as_the_published_one(backend):
    config = config_of(**WIDE, init_std=0.02)
    model = backend.model_class()(config)
    for row in weights(config):
        values = backend.numpy(model.weight(row.name))
        if row.kind == "bias":
            assert (values == 0).all(), row.name
        elif row.kind == "scale":
            assert (values == 1).all(), row.name
        else:
            assert values.std() == pytest.approx(0.02, rel=0.06), row.name
            assert abs(values.mean()) < 0.002, row.name
    assert (backend.numpy(model.weight("decoder.embed_tokens.weight"))[config.pad_token_id] == 0).all()


def test_a_fresh_model_knows_nothing(backend):
    config = config_of(**WIDE)
    ids = token_ids(config)
    assert float(backend.model_class()(config)(ids, labels=ids).loss) == pytest.approx(math.log(499), abs=0.15)


def test_every_variant_can_be_built_and_runs(backend):
    for variant in VARIANTS:
        config = config_of(variant)
        ids = token_ids(config)
        assert np.isfinite(float(backend.model_class()(config)(ids, labels=ids).loss)), variant


def test_a_callable_activation_is_used(backend):
    config = config_of("gelu")
    ids = token_ids(config)
    want = backend.numpy(backend.random_model(config_of("silu"))(ids).logits)
    model = backend.random_model(config)

    def silu(x):
        return x / (1 + _exp(backend, -x))

    for layer in model.base_model.decoder.layers:
        layer.activation = silu
    np.testing.assert_allclose(backend.numpy(model(ids).logits), want, atol=1e-4)
    built = backend.model_class()(config.replace(activation_function=silu))
    assert built.base_model.decoder.layers[0].activation is silu


def _exp(backend, x):
    return getattr(backend, {"torch": "torch", "tf": "tf", "flax": "jnp"}[backend.name]).exp(x)


@pytest.mark.parametrize("switch", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_only_and_keeps_the_mean(backend, switch):
    config = config_of("pre-norm", **{switch: 0.3})
    model, ids = backend.random_model(config), token_ids(config)
    calm = backend.numpy(model(ids).logits)
    training = backend.train(model)
    draws = np.stack([backend.numpy(training(ids, use_cache=False).logits) for _ in range(12)])
    assert np.abs(draws[0] - draws[1]).max() > 1e-3
    assert np.abs(draws.mean(0) - calm).mean() < np.abs(draws - calm).mean()


def test_attention_dropout_differs_between_rows_and_heads(backend):
    config = config_of(attention_dropout=0.5, num_hidden_layers=1)
    model = backend.random_model(config)
    ids = np.repeat(token_ids(config, 1, 13), 4, axis=0)  # four equal rows
    logits = backend.numpy(backend.train(model)(ids, use_cache=False).logits)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_layerdrop_of_one_skips_every_layer_in_training(backend):
    config = config_of(layerdrop=1.0)
    model, ids = backend.random_model(config), token_ids(config)
    full = backend.numpy(model(ids).logits)
    no_layers = backend.random_model(config_of("no layers"))
    skipped = backend.numpy(backend.train(model)(ids, use_cache=False).logits)
    np.testing.assert_allclose(skipped, backend.numpy(no_layers(ids).logits), atol=1e-5)
    assert np.abs(skipped - full).max() > 1e-2


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m"])
def test_model_and_layer_types_name_the_published_modules(backend, name):
    config = OPTConfig.preset(name).replace(num_hidden_layers=1, vocab_size=53, hidden_size=48, ffn_dim=7)
    config = config.replace(num_attention_heads=3, max_position_embeddings=5)
    model = backend.model_class()(config)
    assert model.model.decoder.layers[0].self_attn.q_proj.weight.shape == (48, 48)
    assert model.base_model is model.model
