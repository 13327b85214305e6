"""Causal self-attention in O(T) memory, TensorFlow: blocks of queries against blocks of keys, with a running softmax.

TensorFlow has no fused attention on a CPU. These are loops of TensorFlow's own products, the same in eager mode, in
graphs and under XLA, with dynamic batch and length; not one kernel, but no [T, T] array either, forward or backward.
The running softmax is that of Milakov and Gimelshein (arXiv:1805.02867); the backward pass computes the weights anew
from the saved logarithm of each row's sum (Dao et al., arXiv:2205.14135, appendix B). All inside is float32 at least.
"""

from typing import NamedTuple

import tensorflow as tf
from tensorflow import Tensor

from opt_tf.layers import at_least_float32, dims

BLOCK = 256  # positions; a [256, 256] block of scores of one head is 256 KiB


def blockwise_attention(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, first_BT: Tensor | None = None) -> Tensor:
    """Attention of T tokens among themselves, each to itself and those before it; the query is scaled already.

    With `first_BT`, query t of row b sees no token before first_BT[b, t], which may not decrease along t; blocks that
    no row of a batch needs are skipped.
    """
    T = dims(q_BNTH)[2]
    blocks = _make_blocks(T, first_BT)

    @tf.custom_gradient
    def attend(*qkv_BNTH: Tensor):
        q, k, v = (blocks.fill(x) for x in qkv_BNTH)
        out, log_sum_BNT = attend_blocks(blocks, q, k, v)

        def gradient(d_out_BNTH: Tensor) -> tuple[Tensor, ...]:
            d_out = blocks.fill(d_out_BNTH)
            delta_BNT = tf.reduce_sum(at_least_float32(out) * at_least_float32(d_out), axis=-1)
            saved = (q, k, v, d_out, log_sum_BNT, delta_BNT)
            return tuple(x[:, :, :T] for x in (query_gradients(blocks, *saved), *key_gradients(blocks, *saved)))

        return out[:, :, :T], gradient

    return attend(q_BNTH, k_BNTH, v_BNTH)


class Blocks(NamedTuple):
    """J blocks of C positions; and where documents begin."""

    C: int | Tensor
    J: int | Tensor
    first_BT: Tensor | None  # filled up to J * C positions

    def fill(self, x_BNTH: Tensor) -> Tensor:
        """Zeros up to a whole number of blocks, where no real query looks."""
        return tf.pad(x_BNTH, [[0, 0], [0, 0], [0, self.J * self.C - dims(x_BNTH)[2]], [0, 0]])

    def take(self, x: Tensor, j: Tensor) -> Tensor:
        """Block j of [B, N, T, ...], in float32 at least."""
        B, N, _, *rest = dims(x)
        return at_least_float32(tf.slice(x, [0, 0, j * self.C, *[0] * len(rest)], [B, N, self.C, *rest]))

    def first_key(self, j: Tensor) -> int | Tensor:
        """The first block of keys that a query of block j sees."""
        if self.first_BT is None:
            return 0
        return tf.reduce_min(self.first_BT[:, j * self.C]) // self.C

    def stop_query(self, i: Tensor) -> int | Tensor:
        """The block behind the last one with a query that sees a key of block i."""
        if self.first_BT is None:
            return self.J
        first_J = tf.reduce_min(self.first_BT, axis=0)[:: self.C]
        return tf.reduce_sum(tf.cast(first_J < (i + 1) * self.C, tf.int32))

    def visible(self, j: Tensor, i: Tensor, diagonal: bool) -> Tensor | None:
        """True where query t of block j sees key s of block i, [1 or B, 1, C, C]; None where all see all."""
        t, s = (block * self.C + tf.range(self.C) for block in (j, i))
        mask = (s <= t[:, None])[None, None] if diagonal else None
        if self.first_BT is None:
            return mask
        first_BC = tf.slice(self.first_BT, [0, j * self.C], [dims(self.first_BT)[0], self.C])
        begun = (s >= first_BC[..., None])[:, None]
        return begun if mask is None else mask & begun


def _make_blocks(T: int | Tensor, first_BT: Tensor | None) -> Blocks:
    C = min(BLOCK, T) if isinstance(T, int) else tf.minimum(BLOCK, T)
    J = -(-T // C)
    if first_BT is not None:  # what fills the last block goes with the last document
        first_BT = tf.cast(first_BT, tf.int32)
        first_BT = tf.concat([first_BT, tf.tile(first_BT[:, -1:], [1, J * C - T])], axis=1)
    return Blocks(C, J, first_BT)


def attend_blocks(blocks: Blocks, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output [B, N, T, H] and the logarithm of each row's sum of exponentials [B, N, T]."""

    def query_block(j, outs, log_sums):
        q_j = blocks.take(q, j)

        def scores_with(i, diagonal):
            scores = tf.matmul(q_j, blocks.take(k, i), transpose_b=True)
            mask = blocks.visible(j, i, diagonal)
            return scores if mask is None else tf.where(mask, scores, float("-inf"))

        scores = scores_with(j, True)  # first, since there each query sees itself: from here on no peak is -inf
        peak = tf.reduce_max(scores, axis=-1, keepdims=True)
        weights = tf.exp(scores - peak)
        state = (peak, tf.reduce_sum(weights, axis=-1, keepdims=True), tf.matmul(weights, blocks.take(v, j)))

        def key_block(i, peak, total, out):
            scores = scores_with(i, False)
            new_peak = tf.maximum(peak, tf.reduce_max(scores, axis=-1, keepdims=True))
            weights, kept = tf.exp(scores - new_peak), tf.exp(peak - new_peak)
            total = total * kept + tf.reduce_sum(weights, axis=-1, keepdims=True)
            return i + 1, new_peak, total, out * kept + tf.matmul(weights, blocks.take(v, i))

        peak, total, out = loop(blocks.first_key(j), j, key_block, *state)
        log_sum = (peak + tf.math.log(total))[..., 0]
        return j + 1, outs.write(j, tf.cast(out / total, q.dtype)), log_sums.write(j, log_sum)

    wide = tf.float64 if q.dtype == tf.float64 else tf.float32
    arrays = tf.TensorArray(q.dtype, blocks.J), tf.TensorArray(wide, blocks.J)
    return tuple(map(_joined, loop(0, blocks.J, query_block, *arrays)))


def query_gradients(blocks: Blocks, q, k, v, d_out, log_sum_BNT, delta_BNT) -> Tensor:
    def query_block(j, d_qs):
        q_j, d_out_j, log_sum_j, delta_j = (blocks.take(x, j) for x in (q, d_out, log_sum_BNT, delta_BNT))

        def part(i, diagonal):
            k_i = blocks.take(k, i)
            weights = tf.exp(tf.matmul(q_j, k_i, transpose_b=True) - log_sum_j[..., None])
            mask = blocks.visible(j, i, diagonal)
            weights = weights if mask is None else tf.where(mask, weights, 0)
            d_weights = tf.matmul(d_out_j, blocks.take(v, i), transpose_b=True)
            return tf.matmul(weights * (d_weights - delta_j[..., None]), k_i)

        start = blocks.first_key(j)
        (d_q,) = loop(start, j, lambda i, d_q: (i + 1, d_q + part(i, False)), part(j, True))
        return j + 1, d_qs.write(j, tf.cast(d_q, q.dtype))

    (d_qs,) = loop(0, blocks.J, query_block, tf.TensorArray(q.dtype, blocks.J))
    return _joined(d_qs)


def key_gradients(blocks: Blocks, q, k, v, d_out, log_sum_BNT, delta_BNT) -> tuple[Tensor, Tensor]:
    """With the scores transposed, keys by queries: XLA's product with a transposed left factor is half as fast."""

    def key_block(i, d_ks, d_vs):
        k_i, v_i = blocks.take(k, i), blocks.take(v, i)

        def parts(j, diagonal):
            q_j, d_out_j, log_sum_j, delta_j = (blocks.take(x, j) for x in (q, d_out, log_sum_BNT, delta_BNT))
            weights = tf.exp(tf.matmul(k_i, q_j, transpose_b=True) - log_sum_j[..., None, :])
            mask = blocks.visible(j, i, diagonal)
            weights = weights if mask is None else tf.where(tf.linalg.matrix_transpose(mask), weights, 0)
            d_weights = tf.matmul(v_i, d_out_j, transpose_b=True)
            return tf.matmul(weights * (d_weights - delta_j[..., None, :]), q_j), tf.matmul(weights, d_out_j)

        def query_block(j, d_k, d_v):
            more_k, more_v = parts(j, False)
            return j + 1, d_k + more_k, d_v + more_v

        d_k, d_v = loop(i + 1, blocks.stop_query(i), query_block, *parts(i, True))
        return i + 1, d_ks.write(i, tf.cast(d_k, k.dtype)), d_vs.write(i, tf.cast(d_v, v.dtype))

    arrays = tf.TensorArray(k.dtype, blocks.J), tf.TensorArray(v.dtype, blocks.J)
    return tuple(map(_joined, loop(0, blocks.J, key_block, *arrays)))


def _joined(blocks: tf.TensorArray) -> Tensor:
    """J blocks [B, N, C, ...] to [B, N, J * C, ...]."""
    x = blocks.stack()
    J, B, N, C, *rest = dims(x)
    order = [1, 2, 0, 3] + [4] * len(rest)
    return tf.reshape(tf.transpose(x, order), [B, N, J * C, *rest])


def loop(start, stop, body, *state) -> tuple:
    """`body(i, *state)` for i from `start` to `stop` - 1; returns the last state."""
    start, stop = tf.convert_to_tensor(start, tf.int32), tf.convert_to_tensor(stop, tf.int32)
    _, *state = tf.while_loop(lambda i, *_: i < stop, body, (start, *state), parallel_iterations=1)
    return tuple(state)
