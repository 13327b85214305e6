"""Attention with O(T) memory: the eager formula's numbers, forward and backward, without its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import ROUNDOFF

from opt_flax.attention import causal_attention, eager_attention
from opt_flax.blockwise import BLOCK, blockwise_attention


def queries_keys_values(T: int, dtype="float32", *, seed: int = 0) -> list[jax.Array]:
    """Queries, keys, values and a cotangent [2, 3, T, 7]."""
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.standard_normal((2, 3, T, 7)), dtype) for _ in range(4)]


def eager(q_BNTH, k_BNTH, v_BNTH):
    return eager_attention(q_BNTH, k_BNTH, v_BNTH, None)[0]


@jax.jit
def in_blocks(q_BNTH, k_BNTH, v_BNTH):
    return blockwise_attention(q_BNTH, k_BNTH, v_BNTH, 11)


@functools.partial(jax.jit, static_argnums=0)
def output_and_gradients(function, q_BNTH, k_BNTH, v_BNTH, cotangent_BNTH):
    out_BNTH, vjp = jax.vjp(function, q_BNTH, k_BNTH, v_BNTH)
    return out_BNTH, vjp(cotangent_BNTH)


def distance(got, truth) -> float:
    got, truth = np.asarray(got, np.float64), np.asarray(truth, np.float64)
    return np.linalg.norm(got - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("T", [1, 29, 33], ids=lambda T: f"{T} tokens in blocks of 11")
def test_blocks_change_neither_the_output_nor_the_gradients(T, dtype):
    q, k, v, cotangent = queries_keys_values(T, dtype)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    truth, true_gradients = output_and_gradients(eager, *wide, cotangent.astype(jnp.float32))
    got, gradients = output_and_gradients(in_blocks, q, k, v, cotangent)
    assert got.dtype == dtype
    assert distance(got, truth) <= 8 * ROUNDOFF[dtype]
    for gradient, true_gradient in zip(gradients, true_gradients, strict=True):
        assert gradient.dtype == dtype
        if T > 1:  # of one key, the weight is 1 whatever the query
            assert distance(gradient, true_gradient) <= 16 * ROUNDOFF[dtype]


def test_large_scores_overflow_nothing():
    q, k, v, cotangent = queries_keys_values(29, "float16")
    large = [100 * q, 100 * k, v]
    got, gradients = output_and_gradients(in_blocks, *large, cotangent)
    assert distance(got, eager(*(x.astype(jnp.float32) for x in large))) <= 8 * ROUNDOFF["float16"]
    assert all(jnp.isfinite(x).all() for x in (got, *gradients))


def test_a_token_sees_nothing_behind_it():
    q, k, v, _ = queries_keys_values(29)
    got = in_blocks(q, k.at[:, :, 17:].set(1e9), v.at[:, :, 17:].set(1e9))
    np.testing.assert_array_equal(got[:, :, :17], in_blocks(q, k, v)[:, :, :17])


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporary_bytes(function, T: int) -> int:
        shapes = [jax.ShapeDtypeStruct((1, 3, T, 7), jnp.float32)] * 3
        gradient = jax.grad(lambda *x: function(*x).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(causal_attention, 8 * BLOCK) < 3 * temporary_bytes(causal_attention, 4 * BLOCK)
    assert temporary_bytes(causal_attention, 8 * BLOCK) < temporary_bytes(eager, 8 * BLOCK) / 8
