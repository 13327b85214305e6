"""Attention in blocks against the plain one: forward and gradients, eagerly, in graphs and under XLA, any size."""

import numpy as np
import pytest
import tensorflow as tf

from opt_tf import blockwise, rowwise
from opt_tf.attention import causal_attention, eager_attention
from opt_tf.blockwise import BLOCK, blockwise_attention
from opt_tf.rowwise import ROWS, rowwise_attention

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
    "graph": tf.function(lambda *qkv: blockwise_attention(*qkv), autograph=False, input_signature=DYNAMIC),
    "xla": tf.function(lambda *qkv: blockwise_attention(*qkv), autograph=False, jit_compile=True),
    "rows": rowwise_attention,
    "rows in a graph": tf.function(rowwise_attention, autograph=False),
}


@pytest.mark.parametrize("T", [1, 83, BLOCK, BLOCK + 1, BLOCK + 2, 2 * BLOCK + 89])
@pytest.mark.parametrize("way", WAYS)
def test_blockwise_attention_equals_the_plain_one_with_its_gradients(way, T):
    if way == "xla" and T not in (83, 2 * BLOCK + 89):
        pytest.skip("each length is compiled anew; two of them are enough")
    got, want = (output_and_gradients(attend, queries_keys_values(T)) for attend in (WAYS[way], plain))
    for name, x, y in zip(("out", "d_q", "d_k", "d_v"), got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("spec", [None, tf.TensorSpec([None, N, 83, H], tf.float64)], ids=["static", "any batch"])
def test_heads_one_after_another_equal_the_plain_attention_with_its_gradients(spec, monkeypatch):
    monkeypatch.setattr(rowwise, "ROWS", 16)
    monkeypatch.setattr(rowwise, "TOGETHER", 82)
    attend = tf.function(rowwise_attention, autograph=False, input_signature=spec and [spec] * 3)
    got, want = (output_and_gradients(attend, queries_keys_values(83)) for attend in (attend, plain))
    for name, x, y in zip(("out", "d_q", "d_k", "d_v"), got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12, err_msg=name)
    operations = attend.get_concrete_function(*queries_keys_values(83)).graph.get_operations()
    assert any(op.type in ("While", "StatelessWhile") for op in operations)


# Three documents in one row, one in the other; their borders lie within blocks, on their edges, and one after another.
STARTS = [[0, 13, 48], [0], [0, 1, 2]]


def first_of_documents(T: int, batch: list[list[int]]) -> tf.Tensor:
    """[B, T]: where the document of each token begins."""
    return tf.constant([[max(s for s in starts if s <= t) for t in range(T)] for starts in batch], tf.int64)


@pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "xla"])
def test_documents_in_a_row_do_not_see_each_other(jit_compile, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    T, first_BT = 83, first_of_documents(83, STARTS)
    attend = lambda *qkv: blockwise_attention(*qkv, first_BT)  # noqa: E731
    if jit_compile is not None:
        attend = tf.function(attend, autograph=False, jit_compile=jit_compile)
    qkv = queries_keys_values(T, batch=len(STARTS))
    masked = lambda *qkv: eager_attention(*qkv, None, 0.0, first_BT)[0]  # noqa: E731
    for name, x, y in zip(
        ("out", "d_q", "d_k", "d_v"), output_and_gradients(attend, qkv), output_and_gradients(masked, qkv), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-12, err_msg=name)


def test_the_plain_attention_of_a_row_of_documents_is_that_of_each_alone():
    (starts, T), (q, k, v) = (STARTS[0], 83), queries_keys_values(83, batch=1)
    got = eager_attention(q, k, v, None, 0.0, first_of_documents(T, [starts]))[0]
    for start, stop in zip(starts, [*starts[1:], T], strict=True):
        alone = plain(*(x[:, :, start:stop] for x in (q, k, v)))
        np.testing.assert_allclose(got[:, :, start:stop], alone, atol=1e-12)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_blocks_that_no_document_reaches_are_not_read(jit_compile, monkeypatch):
    """The first document holds NaN: where its blocks were multiplied by weights of zero, all would be NaN."""
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    T, start = 83, 48
    first_BT = first_of_documents(T, [[0, start]] * B)
    broken = [tf.concat([x[:, :, :start] * float("nan"), x[:, :, start:]], axis=2) for x in queries_keys_values(T)]
    attend = lambda *qkv: blockwise_attention(*qkv, first_BT)  # noqa: E731
    got = output_and_gradients(tf.function(attend, autograph=False, jit_compile=jit_compile), broken)
    for x in got:
        assert np.isnan(x[:, :, :start]).all()
        assert np.isfinite(x[:, :, start:]).all()


@pytest.mark.parametrize("attend", [blockwise_attention, rowwise_attention])
def test_large_scores_of_either_sign_overflow_nothing(attend):
    q, k, v = queries_keys_values(BLOCK + 41)
    got, want = (output_and_gradients(attend, [q * 1e3, k, v]) for attend in (attend, plain))
    for x, y in zip(got, want, strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, atol=1e-9)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_no_array_of_all_scores_is_made(jit_compile):
    """The graph of a long sequence, forward and backward, has few numbers for each position, not one for each other."""
    T = 1027
    qkv = [tf.TensorSpec([1, N, T, H], tf.float32)] * 3
    attend = lambda *qkv: output_and_gradients(causal_attention, list(qkv))  # noqa: E731
    traced = tf.function(attend, jit_compile=jit_compile).get_concrete_function(*qkv)
    definition = traced.graph.as_graph_def(add_shapes=True)
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    shapes = [[d.size for d in s.dim] for n in nodes for s in n.attr["_output_shapes"].list.shape]
    assert len(shapes) > 100
    assert max(np.prod(s, initial=1) for s in shapes) <= N * T * max(ROWS, BLOCK)
    assert max(np.prod(s, initial=1) for s in shapes) < N * T * T / 4


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_rows_are_unrolled_outside_xla_and_blocks_looped_over_inside(jit_compile):
    traced = tf.function(lambda *qkv: causal_attention(*qkv), jit_compile=jit_compile)
    traced = traced.get_concrete_function(*[tf.TensorSpec([B, N, BLOCK + 7, H], tf.float32)] * 3)
    loops = [op for op in traced.graph.get_operations() if op.type in ("While", "StatelessWhile")]
    assert bool(loops) is jit_compile
