"""Causal attention in O(T) memory, JAX: the online softmax of Milakov and Gimelshein (arXiv:1805.02867), by blocks.

The scores of one block of queries against one block of keys exist at a time, forward and backward; blocks above the
diagonal are skipped. The backward pass recomputes the weights from the saved log-sum-exp, as in Dao et al.
(arXiv:2205.14135, appendix B). Not a fused kernel: XLA runs separate products per block. Only reverse-mode derivatives;
"eager" attention has the others.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from opt_flax.layers import at_least_float32, contract

BLOCK = 256  # queries, and keys, that are held at a time


def blockwise_attention(q_BNTH: Array, k_BNTH: Array, v_BNTH: Array, block: int = BLOCK) -> Array:
    """Attention of T tokens among themselves [B, N, T, H]; the query is scaled already.

    T is filled up to whole blocks with zeros, which no real query sees.
    """
    T = q_BNTH.shape[2]
    fill = ((0, 0), (0, 0), (0, -T % block), (0, 0))
    return _attend(*(jnp.pad(x_BNTH, fill) for x_BNTH in (q_BNTH, k_BNTH, v_BNTH)), block)[:, :, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q_BNTH: Array, k_BNTH: Array, v_BNTH: Array, block: int) -> Array:
    return _forward(q_BNTH, k_BNTH, v_BNTH, block)[0]


def _forward(q_BNTH: Array, k_BNTH: Array, v_BNTH: Array, block: int) -> tuple[Array, tuple[Array, ...]]:
    """The output, and what the backward pass needs: inputs, output, log-sum-exp of each query's scores."""

    def attend_block(i: Array) -> tuple[Array, Array]:
        q_BNTH_i = _block(q_BNTH, i, block)

        def add_keys(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest_BNT, sum_BNT, out_BNTH = carry
            scores_BNTS = _scores(q_BNTH_i, _block(k_BNTH, j, block), i, j)
            larger_BNT = jnp.maximum(largest_BNT, scores_BNTS.max(-1))
            weights_BNTS = jnp.exp(scores_BNTS - larger_BNT[..., None])
            shrink_BNT = jnp.exp(largest_BNT - larger_BNT)
            values_BNTH = contract("bnts,bnsh->bnth", weights_BNTS.astype(v_BNTH.dtype), _block(v_BNTH, j, block))
            sum_BNT = sum_BNT * shrink_BNT + weights_BNTS.sum(-1)
            return larger_BNT, sum_BNT, out_BNTH * shrink_BNT[..., None] + values_BNTH

        zeros_BNTH = jnp.zeros(q_BNTH_i.shape, at_least_float32(q_BNTH.dtype))
        start = (jnp.full_like(zeros_BNTH[..., 0], -jnp.inf), zeros_BNTH[..., 0], zeros_BNTH)
        largest_BNT, sum_BNT, out_BNTH = lax.fori_loop(0, i + 1, add_keys, start)
        return (out_BNTH / sum_BNT[..., None]).astype(q_BNTH.dtype), largest_BNT + jnp.log(sum_BNT)

    out_BNTH, log_sum_BNT = map(_join, lax.map(attend_block, _blocks(q_BNTH, block)))
    return out_BNTH, (q_BNTH, k_BNTH, v_BNTH, out_BNTH, log_sum_BNT)


def _backward(block: int, saved: tuple[Array, ...], d_out_BNTH: Array) -> tuple[Array, Array, Array]:
    q_BNTH, k_BNTH, v_BNTH, out_BNTH, log_sum_BNT = saved
    blocks = _blocks(q_BNTH, block)
    wide = at_least_float32(q_BNTH.dtype)
    zeros_BNTH = jnp.zeros((*q_BNTH.shape[:2], block, q_BNTH.shape[3]), wide)
    mean_BNT = (out_BNTH.astype(wide) * d_out_BNTH.astype(wide)).sum(-1)  # of d_weights under the weights

    def weights_and_d_scores(i: Array, j: Array) -> tuple[Array, Array]:
        scores_BNTS = _scores(_block(q_BNTH, i, block), _block(k_BNTH, j, block), i, j)
        weights_BNTS = jnp.exp(scores_BNTS - _block(log_sum_BNT, i, block)[..., None])
        d_weights_BNTS = contract("bnth,bnsh->bnts", _block(d_out_BNTH, i, block), _block(v_BNTH, j, block))
        d_scores_BNTS = weights_BNTS * (d_weights_BNTS - _block(mean_BNT, i, block)[..., None])
        return weights_BNTS.astype(v_BNTH.dtype), d_scores_BNTS.astype(q_BNTH.dtype)

    def d_keys_and_values(j: Array) -> tuple[Array, Array]:
        def add_queries(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            weights_BNTS, d_scores_BNTS = weights_and_d_scores(i, j)
            d_k_BNSH = contract("bnts,bnth->bnsh", d_scores_BNTS, _block(q_BNTH, i, block))
            d_v_BNSH = contract("bnts,bnth->bnsh", weights_BNTS, _block(d_out_BNTH, i, block))
            return carry[0] + d_k_BNSH, carry[1] + d_v_BNSH

        d_k_BNSH, d_v_BNSH = lax.fori_loop(j, len(blocks), add_queries, (zeros_BNTH, zeros_BNTH))
        return d_k_BNSH.astype(k_BNTH.dtype), d_v_BNSH.astype(v_BNTH.dtype)

    def d_queries(i: Array) -> Array:
        def add_keys(j: Array, d_q_BNTH: Array) -> Array:
            return d_q_BNTH + contract("bnts,bnsh->bnth", weights_and_d_scores(i, j)[1], _block(k_BNTH, j, block))

        return lax.fori_loop(0, i + 1, add_keys, zeros_BNTH).astype(q_BNTH.dtype)

    d_k_BNTH, d_v_BNTH = map(_join, lax.map(d_keys_and_values, blocks))
    return _join(lax.map(d_queries, blocks)), d_k_BNTH, d_v_BNTH


_attend.defvjp(_forward, _backward)


def _scores(q_BNTH: Array, k_BNSH: Array, i: Array, j: Array) -> Array:
    """Scores of block i of the queries and block j of the keys, -inf where a key comes after its query."""
    T = q_BNTH.shape[2]
    attend_TS = j * T + jnp.arange(T) <= i * T + jnp.arange(T)[:, None]
    return jnp.where(attend_TS, contract("bnth,bnsh->bnts", q_BNTH, k_BNSH), -jnp.inf)


def _blocks(x_BNTH: Array, block: int) -> Array:
    return jnp.arange(x_BNTH.shape[2] // block)


def _block(x_BNT: Array, i: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(x_BNT, i * block, block, axis=2)


def _join(blocks: Array) -> Array:
    """[blocks, B, N, t, ...] to [B, N, T, ...]."""
    x = jnp.moveaxis(blocks, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
