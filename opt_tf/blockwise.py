"""Causal self-attention in O(T) memory, TensorFlow: blocks of queries against blocks of keys, with a running softmax.

TensorFlow has no fused attention on a CPU. These are loops of TensorFlow's own products, the same in eager mode, in
graphs and under XLA, with dynamic batch and length; not one kernel, but no [T, T] array either, forward or backward.
The running softmax is that of Milakov and Gimelshein (arXiv:1805.02867); the backward pass computes the weights anew
from the saved logarithm of each row's sum (Dao et al., arXiv:2205.14135, appendix B). All inside is float32 at least.
"""

import tensorflow as tf
from tensorflow import Tensor

from opt_tf.layers import at_least_float32, dims

BLOCK = 256  # positions; a [256, 256] block of scores of one head is 256 KiB

# Below, J stands for the number of blocks and C for the positions of one: [B, N, T, H] becomes [J, B, N, C, H].


@tf.custom_gradient
def blockwise_attention(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor):
    """Attention of T tokens among themselves, each to itself and those before it; the query is scaled already."""
    T = dims(q_BNTH)[2]
    C = min(BLOCK, T) if isinstance(T, int) else tf.minimum(BLOCK, T)
    q, k, v = (split_blocks(x, C) for x in (q_BNTH, k_BNTH, v_BNTH))
    out, log_sums = attend_blocks(q, k, v)

    def gradient(d_out_BNTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_out = split_blocks(d_out_BNTH, C)
        deltas = tf.reduce_sum(at_least_float32(out) * at_least_float32(d_out), axis=-1, keepdims=True)
        blocks = (q, k, v, d_out, log_sums, deltas)
        d_k, d_v = key_gradients(*blocks)
        return tuple(join_blocks(x, T) for x in (query_gradients(*blocks), d_k, d_v))

    return join_blocks(out, T), gradient


def split_blocks(x_BNTH: Tensor, C: int | Tensor) -> Tensor:
    """[B, N, T, H] to [J, B, N, C, H]; zeros fill the last block, where no real query looks."""
    B, N, T, H = dims(x_BNTH)
    J = -(-T // C)
    x_BNTH = tf.pad(x_BNTH, [[0, 0], [0, 0], [0, J * C - T], [0, 0]])
    return tf.transpose(tf.reshape(x_BNTH, [B, N, J, C, H]), [2, 0, 1, 3, 4])


def join_blocks(x_JBNCH: Tensor, T: int | Tensor) -> Tensor:
    """The inverse of `split_blocks`."""
    J, B, N, C, H = dims(x_JBNCH)
    return tf.reshape(tf.transpose(x_JBNCH, [1, 2, 0, 3, 4]), [B, N, J * C, H])[:, :, :T]


def attend_blocks(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output [J, B, N, C, H] and the logarithm of each row's sum of exponentials [J, B, N, C, 1]."""
    J, mask_CC = dims(q)[0], causal_block(q)

    def query_block(j, outs, log_sums):
        q_j = q[j]
        scores = tf.where(mask_CC, product(q_j, k[j], transpose_b=True), float("-inf"))
        peak = tf.reduce_max(scores, axis=-1, keepdims=True)
        weights = tf.exp(scores - peak)
        state = (peak, tf.reduce_sum(weights, axis=-1, keepdims=True), product(weights, v[j]))

        def key_block(i, peak, total, out):
            scores = product(q_j, k[i], transpose_b=True)
            new_peak = tf.maximum(peak, tf.reduce_max(scores, axis=-1, keepdims=True))
            weights, kept = tf.exp(scores - new_peak), tf.exp(peak - new_peak)
            total = total * kept + tf.reduce_sum(weights, axis=-1, keepdims=True)
            return i + 1, new_peak, total, out * kept + product(weights, v[i])

        peak, total, out = loop(0, j, key_block, *state)
        return j + 1, outs.write(j, tf.cast(out / total, q.dtype)), log_sums.write(j, peak + tf.math.log(total))

    dtype = at_least_float32(q).dtype
    outs, log_sums = loop(0, J, query_block, tf.TensorArray(q.dtype, J), tf.TensorArray(dtype, J))
    return outs.stack(), log_sums.stack()


def query_gradients(q, k, v, d_out, log_sums, deltas) -> Tensor:
    J, mask_CC = dims(q)[0], causal_block(q)

    def query_block(j, d_qs):
        d_out_j, log_sum_j, delta_j, q_j = d_out[j], log_sums[j], deltas[j], q[j]

        def part(i, mask):
            return product(score_gradient(q_j, k[i], v[i], d_out_j, log_sum_j, delta_j, mask)[1], k[i])

        (d_q,) = loop(0, j, lambda i, d_q: (i + 1, d_q + part(i, None)), part(j, mask_CC))
        return j + 1, d_qs.write(j, tf.cast(d_q, q.dtype))

    (d_qs,) = loop(0, J, query_block, tf.TensorArray(q.dtype, J))
    return d_qs.stack()


def key_gradients(q, k, v, d_out, log_sums, deltas) -> tuple[Tensor, Tensor]:
    J, mask_CC = dims(q)[0], causal_block(q)

    def key_block(i, d_ks, d_vs):
        k_i, v_i = k[i], v[i]

        def parts(j, mask):
            weights, d_scores = score_gradient(q[j], k_i, v_i, d_out[j], log_sums[j], deltas[j], mask)
            return product(d_scores, q[j], transpose_a=True), product(weights, d_out[j], transpose_a=True)

        def query_block(j, d_k, d_v):
            more_k, more_v = parts(j, None)
            return j + 1, d_k + more_k, d_v + more_v

        d_k, d_v = loop(i + 1, J, query_block, *parts(i, mask_CC))
        return i + 1, d_ks.write(i, tf.cast(d_k, k.dtype)), d_vs.write(i, tf.cast(d_v, v.dtype))

    d_ks, d_vs = loop(0, J, key_block, tf.TensorArray(k.dtype, J), tf.TensorArray(v.dtype, J))
    return d_ks.stack(), d_vs.stack()


def score_gradient(q_j, k_i, v_i, d_out_j, log_sum_j, delta_j, mask_CC) -> tuple[Tensor, Tensor]:
    """The weights of one block, computed anew, and the gradient of its scores."""
    weights = tf.exp(product(q_j, k_i, transpose_b=True) - log_sum_j)
    if mask_CC is not None:
        weights = tf.where(mask_CC, weights, 0)
    return weights, weights * (product(d_out_j, v_i, transpose_b=True) - delta_j)


def product(a: Tensor, b: Tensor, **transposes) -> Tensor:
    """A matrix product with float32 output: TensorFlow rounds that of half-precision factors to half precision."""
    return tf.matmul(at_least_float32(a), at_least_float32(b), **transposes)


def causal_block(q_JBNCH: Tensor) -> Tensor:
    """True where query t may attend to key s, within the blocks on the diagonal; all other blocks are full or empty."""
    position_C = tf.range(dims(q_JBNCH)[3])
    return position_C[None, :] <= position_C[:, None]


def loop(start, stop, body, *state) -> tuple:
    """`body(i, *state)` for i from `start` to `stop` - 1; returns the last state."""
    start, stop = tf.convert_to_tensor(start, tf.int32), tf.convert_to_tensor(stop, tf.int32)
    _, *state = tf.while_loop(lambda i, *_: i < stop, body, (start, *state), parallel_iterations=1)
    return tuple(state)
