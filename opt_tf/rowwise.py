"""Causal self-attention in O(T) memory, TensorFlow: a block of queries at a time against all keys up to its end.

What `blockwise.py` does, for a length known to Python and outside XLA. The loop is unrolled, so that products are large
and the softmax is TensorFlow's own, which oneDNN runs in one pass: on a CPU 1.5 times as fast as blocks of keys with a
running softmax. Of many tokens, heads follow one another, as many side by side as there are processors: a block of one
stays in a core's cache from product to product, and what is held is smaller. Under XLA it would be no faster.
"""

import os
from collections.abc import Callable

import tensorflow as tf
from tensorflow import Tensor

from opt_tf.layers import at_least_float32, dims, has_gpu

ROWS = 128  # queries at a time of all heads, of one head twice as many
TOGETHER = 1024  # tokens, up to which all heads at once are faster
LONGEST = 32 * ROWS  # tokens, beyond which the unrolled graph grows too large


@tf.custom_gradient
def rowwise_attention(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor):
    """Attention of T tokens among themselves, each to itself and those before it; the query is scaled already."""
    (out_BNTH,) = _by_heads(_attend, 1, q_BNTH, k_BNTH, v_BNTH)

    def gradient(d_out_BNTH: Tensor) -> tuple[Tensor, ...]:
        return _by_heads(_gradients, 3, q_BNTH, k_BNTH, v_BNTH, out_BNTH, d_out_BNTH)

    return out_BNTH, gradient


def _by_heads(function: Callable[..., tuple[Tensor, ...]], outputs: int, *arrays: Tensor) -> tuple[Tensor, ...]:
    """`function` of arrays [B, N, T, H]; of many tokens, in a graph on a CPU, of one head of one row after another."""
    B, N, T, H = dims(arrays[0])
    if T <= TOGETHER or tf.executing_eagerly() or has_gpu():  # a loop waits for Python there, or leaves a GPU idle
        return function(ROWS, *arrays)
    heads = tuple(tf.reshape(x, [B * N, 1, 1, T, H]) for x in arrays)

    def attend_head(i: Tensor, *results: tf.TensorArray) -> tuple:
        outs = function(2 * ROWS, *(x[i] for x in heads))
        return i + 1, *(array.write(i, out) for array, out in zip(results, outs, strict=True))

    results = (tf.TensorArray(arrays[0].dtype, B * N, element_shape=[1, 1, T, H]) for _ in range(outputs))
    threads = os.cpu_count() or 1
    _, *results = tf.while_loop(lambda i, *_: i < B * N, attend_head, (0, *results), parallel_iterations=threads)
    return tuple(tf.reshape(array.stack(), [B, N, T, H]) for array in results)


def _attend(rows: int, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor) -> tuple[Tensor]:
    outs: list[Tensor] = []
    for start in range(0, q_BNTH.shape[2], rows):
        q, k, v = _rows_and_prefixes(start, rows, (q_BNTH,), (k_BNTH, v_BNTH), outs[-1:])
        outs.append(tf.cast(product(_weights(q, k, start), v), q_BNTH.dtype))
    return (tf.concat(outs, axis=2),)


def _gradients(
    rows: int, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, out_BNTH: Tensor, d_out_BNTH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    delta_BNT1 = tf.reduce_sum(at_least_float32(out_BNTH) * at_least_float32(d_out_BNTH), axis=-1, keepdims=True)
    d_qs: list[Tensor] = []
    d_ks: list[Tensor] = []
    d_vs: list[Tensor] = []
    d_k = d_v = 0.0  # of the keys up to the end of the block; nothing below a block sees the keys behind it
    for start in reversed(range(0, q_BNTH.shape[2], rows)):
        queries = (q_BNTH, d_out_BNTH, delta_BNT1)
        q, d_out, delta, k, v = _rows_and_prefixes(start, rows, queries, (k_BNTH, v_BNTH), d_qs[:1])
        weights = _weights(q, k, start)
        d_scores = weights * (product(d_out, v, transpose_b=True) - delta)
        d_k += product(d_scores, q, transpose_a=True)
        d_v += product(weights, d_out, transpose_a=True)
        d_qs.insert(0, tf.cast(product(d_scores, k), q_BNTH.dtype))
        d_ks.insert(0, tf.cast(d_k[:, :, start:], k_BNTH.dtype))
        d_vs.insert(0, tf.cast(d_v[:, :, start:], v_BNTH.dtype))
        d_k, d_v = d_k[:, :, :start], d_v[:, :, :start]
    return tf.concat(d_qs, axis=2), tf.concat(d_ks, axis=2), tf.concat(d_vs, axis=2)


def _rows_and_prefixes(start: int, rows: int, queries: tuple, keys: tuple, done: list[Tensor]) -> list[Tensor]:
    """Of query-like tensors the rows of one block, of key-like ones all up to its end; in a graph after `done`."""
    stop = min(start + rows, queries[0].shape[2])
    with tf.control_dependencies(done):  # else a graph computes many blocks at a time, and holds them all
        blocks = [tf.identity(x)[:, :, start:stop] for x in queries]
        return blocks + [tf.identity(x)[:, :, :stop] for x in keys]


def product(a: Tensor, b: Tensor, **transposes) -> Tensor:
    """A matrix product with float32 output: TensorFlow rounds that of half-precision factors to half precision."""
    return tf.matmul(at_least_float32(a), at_least_float32(b), **transposes)


def _weights(q_BNCH: Tensor, k_BNSH: Tensor, start: int) -> Tensor:
    """Of queries C from position `start` on, over the keys before them and their own: [B, N, C, S], S = start + C."""
    scores_BNCS = product(q_BNCH, k_BNSH, transpose_b=True)
    B, N, C, S = dims(scores_BNCS)
    if C > 1:  # -inf above the diagonal, in place: a mask of all scores takes longer than their softmax
        diagonals = [C - 1] if C > 2 else []  # a single one has no axis of its own
        later = tf.fill([B, N, *diagonals, C - 1], tf.constant(float("-inf"), scores_BNCS.dtype))
        scores_BNCS = tf.linalg.set_diag(scores_BNCS, later, k=(start + 1, S - 1))
    return tf.nn.softmax(scores_BNCS)
