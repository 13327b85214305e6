"""Blockwise attention against the plain one: forward and gradients, eagerly, in graphs and under XLA, any size."""

import numpy as np
import pytest
import tensorflow as tf

from opt_tf.attention import causal_attention, eager_attention
from opt_tf.blockwise import BLOCK, blockwise_attention

B, N, H = 2, 3, 5


def queries_keys_values(T: int, dtype="float64", batch: int = B) -> list[tf.Tensor]:
    rng = np.random.default_rng(T)
    return [tf.constant(rng.normal(size=(batch, N, T, H)), dtype) for _ in range(3)]


def plain(q, k, v) -> tf.Tensor:
    return eager_attention(q, k, v, None)[0]


def output_and_gradients(attend, qkv: list[tf.Tensor]) -> list[tf.Tensor]:
    weights = tf.constant(np.random.default_rng(0).normal(size=qkv[0].shape), qkv[0].dtype)
    with tf.GradientTape() as tape:
        tape.watch(qkv)
        out = attend(*qkv)
        total = tf.reduce_sum(out * weights)
    return [out, *tape.gradient(total, qkv)]


DYNAMIC = [tf.TensorSpec([None, N, None, H], tf.float64)] * 3
WAYS = {
    "eager": blockwise_attention,
    "graph": tf.function(blockwise_attention, autograph=False, input_signature=DYNAMIC),
    "xla": tf.function(blockwise_attention, autograph=False, jit_compile=True),
}


@pytest.mark.parametrize("T", [1, 83, BLOCK, BLOCK + 1, 2 * BLOCK + 89])
@pytest.mark.parametrize("way", WAYS)
def test_blockwise_attention_equals_the_plain_one_with_its_gradients(way, T):
    if way == "xla" and T not in (83, 2 * BLOCK + 89):
        pytest.skip("each length is compiled anew; two of them are enough")
    got, want = (output_and_gradients(attend, queries_keys_values(T)) for attend in (WAYS[way], plain))
    for name, x, y in zip(("out", "d_q", "d_k", "d_v"), got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("dtype", "roundoff"), [("float32", 2**-24), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_scores_are_not_rounded_to_half_precision(dtype, roundoff):
    """Scores of some tens: rounded ones would be off by far more than the output's own rounding."""
    q, k, v = queries_keys_values(BLOCK + 41, dtype)
    q = q * 8
    got = tf.cast(blockwise_attention(q, k, v), tf.float64)
    want = plain(*(tf.cast(x, tf.float64) for x in (q, k, v)))
    assert float(tf.reduce_max(tf.abs(got - want))) <= (4 if dtype != "float32" else 64) * roundoff * 4


def test_large_scores_of_either_sign_overflow_nothing():
    q, k, v = queries_keys_values(BLOCK + 41)
    got, want = (output_and_gradients(attend, [q * 1e3, k, v]) for attend in (blockwise_attention, plain))
    for x, y in zip(got, want, strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, atol=1e-9)


def test_no_array_of_all_scores_is_made():
    """The graph of a long sequence, forward and backward, holds no tensor with two dimensions of its length."""
    T = 4 * BLOCK
    qkv = [tf.TensorSpec([1, N, T, H], tf.float32)] * 3
    traced = tf.function(lambda *qkv: output_and_gradients(causal_attention, list(qkv))).get_concrete_function(*qkv)
    definition = traced.graph.as_graph_def(add_shapes=True)
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    shapes = [[d.size for d in s.dim] for n in nodes for s in n.attr["_output_shapes"].list.shape]
    assert len(shapes) > 100
    assert max((s.count(T) for s in shapes), default=0) == 1
