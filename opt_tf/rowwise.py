"""Causal self-attention in O(T) memory, TensorFlow: a block of queries at a time against all keys up to its end.

What `blockwise.py` does, for a length known to Python and outside XLA. The loop is unrolled, so that products are large
and the softmax is TensorFlow's own, which oneDNN runs in one pass: on a CPU 1.5 times as fast as blocks of keys with a
running softmax. Under XLA it would be neither faster nor smaller: nothing keeps XLA from holding all blocks at a time.
"""

import tensorflow as tf
from tensorflow import Tensor

from opt_tf.layers import at_least_float32, dims

ROWS = 128  # queries at a time
LONGEST = 32 * ROWS  # tokens, beyond which the unrolled graph grows too large


@tf.custom_gradient
def rowwise_attention(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor):
    """Attention of T tokens among themselves, each to itself and those before it; the query is scaled already."""
    starts = range(0, q_BNTH.shape[2], ROWS)
    outs = []
    for start in starts:
        q, k, v = _rows_and_prefixes(start, (q_BNTH,), (k_BNTH, v_BNTH), outs[-1:])
        outs.append(tf.cast(product(_weights(q, k, start), v), q_BNTH.dtype))
    out_BNTH = tf.concat(outs, axis=2)

    def gradient(d_out_BNTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        delta_BNT1 = tf.reduce_sum(at_least_float32(out_BNTH) * at_least_float32(d_out_BNTH), axis=-1, keepdims=True)
        d_qs, d_ks, d_vs = [], [], []
        d_k = d_v = 0.0  # of the keys up to the end of the block; nothing below a block sees the keys behind it
        for start in reversed(starts):
            rows = (q_BNTH, d_out_BNTH, delta_BNT1)
            q, d_out, delta, k, v = _rows_and_prefixes(start, rows, (k_BNTH, v_BNTH), d_qs[:1])
            weights = _weights(q, k, start)
            d_scores = weights * (product(d_out, v, transpose_b=True) - delta)
            d_k += product(d_scores, q, transpose_a=True)
            d_v += product(weights, d_out, transpose_a=True)
            d_qs.insert(0, tf.cast(product(d_scores, k), q_BNTH.dtype))
            d_ks.insert(0, tf.cast(d_k[:, :, start:], k_BNTH.dtype))
            d_vs.insert(0, tf.cast(d_v[:, :, start:], v_BNTH.dtype))
            d_k, d_v = d_k[:, :, :start], d_v[:, :, :start]
        return tuple(tf.concat(parts, axis=2) for parts in (d_qs, d_ks, d_vs))

    return out_BNTH, gradient


def _rows_and_prefixes(start: int, queries: tuple, keys: tuple, done: list[Tensor]) -> list[Tensor]:
    """Of query-like tensors the rows of one block, of key-like ones all up to its end; in a graph after `done`."""
    stop = min(start + ROWS, queries[0].shape[2])
    with tf.control_dependencies(done):  # else a graph computes many blocks at a time, and holds them all
        rows = [tf.identity(x)[:, :, start:stop] for x in queries]
        return rows + [tf.identity(x)[:, :, :stop] for x in keys]


def product(a: Tensor, b: Tensor, **transposes) -> Tensor:
    """A matrix product with float32 output: TensorFlow rounds that of half-precision factors to half precision."""
    return tf.matmul(at_least_float32(a), at_least_float32(b), **transposes)


def _weights(q_BNCH: Tensor, k_BNSH: Tensor, start: int) -> Tensor:
    """Of queries C from position `start` on, over the keys before them and their own: [B, N, C, S], S = start + C."""
    scores_BNCS = product(q_BNCH, k_BNSH, transpose_b=True)
    B, N, C, S = dims(scores_BNCS)
    if C > 1:  # -inf above the diagonal, in place: a mask of all scores takes longer than their softmax
        later = tf.fill([B, N, C - 1, C - 1], tf.constant(float("-inf"), scores_BNCS.dtype))
        scores_BNCS = tf.linalg.set_diag(scores_BNCS, later, k=(start + 1, S - 1))
    return tf.nn.softmax(scores_BNCS)
