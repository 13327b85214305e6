"""Attention with O(T) memory: within the bound of float64, forward and backward, without the eager formula's memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_truth import DTYPES, Attended, attention_inputs, beyond_twice, check_bound

from opt_flax.attention import causal_attention, eager_attention
from opt_flax.blockwise import BLOCK, FEW, blockwise_attention

H = 64


def eager(q_BNTH, k_BNTH, v_BNTH, first_BT=None):
    return eager_attention(q_BNTH, k_BNTH, v_BNTH, None, None, first_BT)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def attended(function, block: tuple[int, int], q, k, v, d_out, first_BT=None) -> Attended:
    """The output and the gradients, by blocks of so many queries and keys."""
    blocks = (block,) if block else ()
    out, vjp = jax.vjp(lambda *qkv: function(*qkv, first_BT, *blocks), q, k, v)
    return Attended(out, *vjp(d_out))


def check(dtype: str, block: tuple[int, int], inputs, first_BT=None) -> None:
    """Within the bound at every number, and at most twice as far from the truth as the plain formula."""
    got = attended(blockwise_attention, block, *inputs, first_BT)
    assert {x.dtype.name for x in got} == {dtype}
    truth = check_bound(got, inputs, dtype, first_BT)
    plain = attended(eager, (), *inputs, first_BT)
    assert not beyond_twice(plain, got, truth)


@pytest.mark.parametrize(
    ("T", "block", "H", "dtype"),
    [(37, (13, 5), 64, "float32"), *((29, (7, 14), H, dtype) for H in (64, 80, 128) for dtype in DTYPES)],
)
def test_blocks_change_neither_the_output_nor_the_gradients(T, block, H, dtype):
    check(dtype, block, attention_inputs(dtype, 2, 3, T, H))


def test_a_row_of_many_tokens_in_blocks_of_the_usual_size():
    inputs = attention_inputs("float32", 1, 1, 2 * BLOCK + 11, H, size=2.0)
    check_bound(attended(causal_attention, (), *inputs), inputs, "float32")


def test_one_head_of_one_row_after_another_changes_neither_the_output_nor_the_gradients():
    assert FEW < 137
    first_BT = np.stack([np.repeat([0, 5, 90], [5, 85, 47]), np.repeat([0, 14, 136], [14, 122, 1])])
    inputs = attention_inputs("float32", 2, 3, 137, H)
    check("float32", (64, 48), inputs)
    check("float32", (64, 48), inputs, first_BT)


def test_documents_in_a_row_do_not_see_each_other():
    first_BT = np.stack([np.repeat([0, 5, 20], [5, 15, 17]), np.repeat([0, 14, 36], [14, 22, 1])])
    check("float32", (14, 7), attention_inputs("float32", 2, 1, 37, H), first_BT)


def test_keys_of_other_documents_are_not_even_read():
    """NaN in the first document, which ends with a block of keys and one of queries; the second has none."""
    q, k, v, d_out = attention_inputs("float32", 1, 1, 37, H)
    first_BT = np.repeat([[0, 14]], [14, 23], axis=1)
    k[:, :, :14], v[:, :, :14] = np.nan, np.nan
    got = attended(blockwise_attention, (7, 7), q, k, v, d_out, first_BT)
    assert all(np.isfinite(x[:, :, 14:]).all() for x in got)


def test_large_scores_overflow_nothing():
    q, k, v, d_out = attention_inputs("float16", 2, 3, 29, 7, size=30.0)
    got = attended(blockwise_attention, (7, 14), q, k, v, d_out)
    assert all(jnp.isfinite(x).all() for x in got)
    check_bound(Attended(got.out), (q, k, v), "float16")


def test_a_token_sees_nothing_behind_it():
    q, k, v, d_out = attention_inputs("float32", 2, 3, 29, 7)
    got = attended(blockwise_attention, (7, 14), q, k, v, d_out).out
    k[:, :, 17:], v[:, :, 17:] = 1e9, 1e9
    np.testing.assert_array_equal(got[:, :, :17], attended(blockwise_attention, (7, 14), q, k, v, d_out).out[:, :, :17])


def temporary_bytes(function, T: int, *, backward: bool) -> int:
    """Of 12 heads of 64."""
    shapes = [jax.ShapeDtypeStruct((1, 12, T, 64), jnp.float32)] * 3
    run = jax.grad(lambda *qkv: function(*qkv).sum(), (0, 1, 2)) if backward else function
    return jax.jit(run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_with_its_square():
    few, many = (temporary_bytes(causal_attention, T, backward=True) for T in (4 * BLOCK, 8 * BLOCK))
    assert many < 3 * few


@pytest.mark.parametrize(("backward", "times"), [(False, 10), (True, 5)], ids=["forward", "forward and backward"])
def test_2048_tokens_take_a_fraction_of_the_plain_formula_s_memory(backward, times):
    plain = temporary_bytes(eager, 2048, backward=backward)
    assert temporary_bytes(causal_attention, 2048, backward=backward) * times <= plain
