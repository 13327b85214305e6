"""What a decoding step costs besides reading the weights: nothing is copied, widened or compiled again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from harness import ROUNDOFF, config_of, load_backend, token_ids

from opt_core.generation import BUCKET
from opt_flax import cache, generation
from opt_flax.layers import FEW_ROWS, GROUPS, contract, linear, rows


def a_model(dtype: str = "float32", **changes):
    return load_backend("flax").random_model(config_of(max_position_embeddings=199, **changes), dtype=dtype)


def temporary_bytes(model, batch: int, capacity: int) -> int:
    """What one compiled decoding loop allocates beyond its arguments and results."""
    graphdef, state = nnx.split(model)
    logits_BV, eos = jnp.zeros((batch, model.config.vocab_size), model.dtype), np.array([2], np.int32)
    lowered = generation._decode.lower(graphdef, state, logits_BV, model.init_cache(batch, capacity), eos, 1, 5)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_prompts_of_5_to_60_tokens_compile_one_prefill_and_one_decoding_loop():
    model = a_model(num_hidden_layers=1, ffn_dim=29)  # of a config that no other test compiles
    before = generation._prefill._cache_size(), generation._decode._cache_size()
    for T in range(5, 61, 5):
        model.generate(token_ids(model.config, 2, T), max_new_tokens=BUCKET - T)
    assert (generation._prefill._cache_size(), generation._decode._cache_size()) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_copies_no_cache(batch):
    model, capacity = a_model(num_hidden_layers=5), 11 * BUCKET
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(model.init_cache(batch, capacity)))
    assert temporary_bytes(model, batch, capacity) < cache_bytes / 5


@pytest.mark.parametrize("batch", [1, 3])
def test_no_weight_is_widened_to_decode_in_bfloat16(batch):
    model = a_model("bfloat16", vocab_size=997, hidden_size=64, ffn_dim=256, num_attention_heads=2)
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert temporary_bytes(model, batch, BUCKET) < weight_bytes  # a float32 copy has twice as many


def test_generation_follows_the_weights():
    model = a_model(num_hidden_layers=2)
    ids = token_ids(model.config)
    first = np.asarray(model.generate(ids, max_new_tokens=3, eos_token_id=[0]))
    table = model.get_input_embeddings().weight
    table.set_value(table.get_value()[::-1])
    got = np.asarray(model.generate(ids, max_new_tokens=3, eos_token_id=[0]))
    assert (got != first).any()
    for T in range(ids.shape[1], got.shape[1]):
        assert (got[:, T] == model(got[:, :T]).logits[:, -1].argmax(-1)).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("R", [1, 2, 7, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("out", [31, 7 * GROUPS])
def test_a_product_of_few_rows_equals_that_of_many(out, R, dtype):
    x, weight, bias = (
        jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(R, 53), (out, 53), (out,)])
    )
    wide = [np.asarray(a, np.float64) for a in (x, weight, bias)]
    for some_bias in (None, bias):
        truth = wide[0] @ wide[1].T + (0 if some_bias is None else wide[2])
        got = linear(x[:, None], weight, some_bias)
        assert got.shape == (R, 1, out)
        assert got.dtype == x.dtype
        bound = ROUNDOFF[dtype] * np.abs(truth) + 53 * ROUNDOFF["float32"] * (np.abs(wide[0]) @ np.abs(wide[1]).T)
        assert (np.abs(np.asarray(got[:, 0], np.float64) - truth) <= 1.01 * bound + 1e-7).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.parametrize("out", [31, 7 * GROUPS])
def test_the_gradients_of_a_product_of_few_rows_are_those_of_the_plain_one(out, R, dtype):
    x, weight = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(R, 53), (out, 53)]))
    plain = lambda x, weight: contract("ri,oi->ro", x, weight).astype(x.dtype)  # noqa: E731
    got, want = (jax.grad(lambda x, w, f=f: jnp.sin(f(x, w)).sum(), (0, 1))(x, weight) for f in (linear, plain))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(*(np.asarray(v, np.float32) for v in (a, b)), rtol=0.05, atol=64 * ROUNDOFF[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_pass_through_a_cache_to_old_and_new_tokens(dtype):
    buffer, new, factor = (
        jax.random.normal(jax.random.key(i), shape, dtype)
        for i, shape in enumerate([(2, 3, 7, 5), (2, 3, 2, 5), (2, 3, 7, 5)])
    )
    lengths = jnp.array([3, 6])  # the last token of the second row is beyond the capacity
    gradient = jax.grad(lambda buffer, new: (cache.write(buffer, new, lengths) * factor).sum(), (0, 1))
    for d_buffer, d_new in (gradient(buffer, new), jax.jit(gradient)(buffer, new)):
        np.testing.assert_array_equal(d_new[0], factor[0, :, 3:5])
        np.testing.assert_array_equal(d_new[1], factor[1, :, 6:].at[:, :1].get() * jnp.array([1, 0], dtype)[:, None])
        np.testing.assert_array_equal(d_buffer[0], factor[0].at[:, 3:5].set(0))
        np.testing.assert_array_equal(d_buffer[1], factor[1].at[:, 6].set(0))


def test_bits_of_a_buffer_keep_every_value():
    values = jnp.array([0.0, -0.0, 1.5, jnp.inf, 2.0**-130], jnp.bfloat16)
    back = cache.from_bits(cache.as_bits(values), values.dtype)
    assert cache.as_bits(back).tolist() == cache.as_bits(values).tolist()
    assert cache.as_bits(jnp.ones(3)).dtype == jnp.float32


def test_rows_of_a_bfloat16_table_are_differentiable():
    table = jax.random.normal(jax.random.key(0), (11, 5), jnp.bfloat16)
    gradient = jax.grad(lambda table: rows(table, jnp.array([3, 3, 7])).astype(jnp.float32).sum())(table)
    np.testing.assert_array_equal(gradient.sum(1), 5 * np.bincount([3, 3, 7], minlength=11))
