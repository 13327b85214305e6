"""Causal attention in O(T) memory, JAX: the online softmax of Milakov and Gimelshein (arXiv:1805.02867), by blocks.

The scores of one block of queries against one block of keys exist at a time, forward and backward, on a CPU of one
head; blocks in which no query sees a key are skipped. The backward pass recomputes the weights from the saved
log-sum-exp, as in Dao et al. (arXiv:2205.14135, appendix B). Not a fused kernel: XLA runs separate products per block.
Only reverse-mode derivatives; "eager" attention has the others.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from opt_flax.layers import at_least_float32, contract

# Tokens of a block of queries and of one of keys, at most. On two CPU cores, one head at a time, 512 takes 0.6 of the
# time of 256 forward, 0.8 with the gradients, and 1024 is no faster (jax 0.10, 12 heads of 64, 2048 tokens).
BLOCK = 512
FEW = 128  # tokens, up to which the scores of all heads are small, and one head at a time takes longer


def blockwise_attention(
    q_BNTH: Array, k_BNTH: Array, v_BNTH: Array, first_BT: Array | None = None, block: tuple[int, int] | None = None
) -> Array:
    """Attention of T tokens among themselves [B, N, T, H]; the query is scaled already.

    `first_BT`: the first token that each query sees, not decreasing along a row; without it, token 0. Queries and keys
    are filled up to whole blocks (of so many queries and keys each) with zeros, which no real query sees.
    """
    T = q_BNTH.shape[2]
    if block is None:  # as many blocks as must be, of one size
        block = (-(-T // -(-T // BLOCK)),) * 2
    queries, keys = ((0, -T % size) for size in block)
    q_BNTH = jnp.pad(q_BNTH, ((0, 0), (0, 0), queries, (0, 0)))
    k_BNSH, v_BNSH = (jnp.pad(x_BNTH, ((0, 0), (0, 0), keys, (0, 0))) for x_BNTH in (k_BNTH, v_BNTH))
    if first_BT is not None:
        first_BT = jnp.pad(first_BT, ((0, 0), queries), "edge")
    return _attend(q_BNTH, k_BNSH, v_BNSH, first_BT, block)[:, :, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BNTH: Array, k_BNSH: Array, v_BNSH: Array, first_BT: Array | None, block: tuple[int, int]) -> Array:
    return _forward(q_BNTH, k_BNSH, v_BNSH, first_BT, block)[0]


def _forward(q_BNTH: Array, k_BNSH: Array, v_BNSH: Array, first_BT: Array | None, block: tuple[int, int]):
    """The output, and what the backward pass needs: inputs, output, log-sum-exp of each query's scores."""
    out_BNTH, log_sum_BNT = _by_heads(functools.partial(_forward_blocks, block), first_BT, q_BNTH, k_BNSH, v_BNSH)
    return out_BNTH, (q_BNTH, k_BNSH, v_BNSH, first_BT, out_BNTH, log_sum_BNT)


def _backward(block: tuple[int, int], saved: tuple, d_out_BNTH: Array) -> tuple[Array, Array, Array, None]:
    q_BNTH, k_BNSH, v_BNSH, first_BT, out_BNTH, log_sum_BNT = saved
    wide = at_least_float32(q_BNTH.dtype)
    mean_BNT = (out_BNTH.astype(wide) * d_out_BNTH.astype(wide)).sum(-1)  # of d_weights under the weights
    arrays = q_BNTH, k_BNSH, v_BNSH, d_out_BNTH, log_sum_BNT, mean_BNT
    return *_by_heads(functools.partial(_backward_blocks, block), first_BT, *arrays), None


_attend.defvjp(_forward, _backward)


def _by_heads(function: Callable, first_BT: Array | None, *arrays: Array) -> tuple[Array, ...]:
    """`function` of all arrays [B, N, ...] at once; on a CPU of one head of one row after another.

    A CPU multiplies no faster for being given several heads, and the scores of one alone stay in its caches.
    """
    B, N, T = arrays[0].shape[:3]
    if T <= FEW:
        return function(first_BT, *arrays)

    def each(first_BT: Array | None, *arrays: Array) -> tuple[Array, ...]:
        def of_head(index: Array) -> tuple[Array, ...]:
            b, n = index // N, index % N
            return function(None if first_BT is None else first_BT[b][None], *(x[b, n][None, None] for x in arrays))

        return tuple(x.reshape(B, N, *x.shape[3:]) for x in lax.map(of_head, jnp.arange(B * N)))

    return lax.platform_dependent(first_BT, *arrays, cpu=each, default=function)


def _forward_blocks(
    block: tuple[int, int], first_BT: Array | None, q_BNTH: Array, k_BNSH: Array, v_BNSH: Array
) -> tuple[Array, Array]:
    """The output, and the log-sum-exp of each query's scores."""
    queries, keys = block

    def attend_block(i: Array) -> tuple[Array, Array]:
        q_BNTH_i = _block(q_BNTH, i, queries)

        def add_keys(j: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
            largest_BNT, sum_BNT, out_BNTH = carry
            scores_BNTS = contract("bnth,bnsh->bnts", q_BNTH_i, _block(k_BNSH, j, keys))
            if masked:
                scores_BNTS = _mask(scores_BNTS, first_BT, i, j)
            larger_BNT = jnp.maximum(largest_BNT, scores_BNTS.max(-1))
            weights_BNTS = jnp.exp(scores_BNTS - larger_BNT[..., None])
            shrink_BNT = jnp.exp(largest_BNT - larger_BNT)
            values_BNTH = contract("bnts,bnsh->bnth", weights_BNTS.astype(v_BNSH.dtype), _block(v_BNSH, j, keys))
            sum_BNT = sum_BNT * shrink_BNT + weights_BNTS.sum(-1)
            return larger_BNT, sum_BNT, out_BNTH * shrink_BNT[..., None] + values_BNTH

        zeros_BNTH = jnp.zeros(q_BNTH_i.shape, at_least_float32(q_BNTH.dtype))
        start = (jnp.full_like(zeros_BNTH[..., 0], _lowest(zeros_BNTH)), zeros_BNTH[..., 0], zeros_BNTH)
        begin = 0 if first_BT is None else first_BT[:, i * queries].min() // keys
        masked = i * queries // keys if first_BT is None else begin  # from here on, not every query sees every key
        carry = lax.fori_loop(begin, masked, functools.partial(add_keys, masked=False), start)
        end = jnp.minimum(((i + 1) * queries - 1) // keys + 1, k_BNSH.shape[2] // keys)
        carry = lax.fori_loop(masked, end, functools.partial(add_keys, masked=True), carry)
        largest_BNT, sum_BNT, out_BNTH = carry
        return (out_BNTH / sum_BNT[..., None]).astype(q_BNTH.dtype), largest_BNT + jnp.log(sum_BNT)

    blocks = jnp.arange(q_BNTH.shape[2] // queries)
    out_BNTH, log_sum_BNT = map(_join, lax.map(attend_block, blocks))
    return out_BNTH, log_sum_BNT


def _backward_blocks(
    block: tuple[int, int], first_BT: Array | None, q_BNTH: Array, k_BNSH: Array, v_BNSH: Array,
    d_out_BNTH: Array, log_sum_BNT: Array, mean_BNT: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Each pair of blocks is visited once, by blocks of keys; the queries' derivatives are added up in place."""
    queries, keys = block
    wide = at_least_float32(q_BNTH.dtype)
    blocks = q_BNTH.shape[2] // queries

    def visit_keys(d_q_BNTH: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        k_BNSH_j, v_BNSH_j = _block(k_BNSH, j, keys), _block(v_BNSH, j, keys)

        def add_queries(i: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
            d_q_BNTH, d_k_BNSH, d_v_BNSH = carry
            q_BNTH_i, d_out_BNTH_i = _block(q_BNTH, i, queries), _block(d_out_BNTH, i, queries)
            scores_BNTS = contract("bnth,bnsh->bnts", q_BNTH_i, k_BNSH_j)
            if masked:
                scores_BNTS = _mask(scores_BNTS, first_BT, i, j)
            weights_BNTS = jnp.exp(scores_BNTS - _block(log_sum_BNT, i, queries)[..., None])
            d_weights_BNTS = contract("bnth,bnsh->bnts", d_out_BNTH_i, v_BNSH_j)
            d_scores_BNTS = weights_BNTS * (d_weights_BNTS - _block(mean_BNT, i, queries)[..., None])
            d_scores_BNTS = d_scores_BNTS.astype(q_BNTH.dtype)
            d_q_BNTH_i = _block(d_q_BNTH, i, queries) + contract("bnts,bnsh->bnth", d_scores_BNTS, k_BNSH_j)
            d_k_BNSH += contract("bnts,bnth->bnsh", d_scores_BNTS, q_BNTH_i)
            d_v_BNSH += contract("bnts,bnth->bnsh", weights_BNTS.astype(v_BNSH.dtype), d_out_BNTH_i)
            return lax.dynamic_update_slice_in_dim(d_q_BNTH, d_q_BNTH_i, i * queries, 2), d_k_BNSH, d_v_BNSH

        zeros_BNSH = jnp.zeros(k_BNSH_j.shape, wide)
        behind = (j + 1) * keys  # queries from here on see all keys of this block, but for documents
        end = blocks if first_BT is None else (first_BT[:, ::queries].min(0) < behind).sum()
        unmasked = jnp.minimum(-(-behind // queries), end) if first_BT is None else end
        carry = (d_q_BNTH, zeros_BNSH, zeros_BNSH)
        carry = lax.fori_loop(j * keys // queries, unmasked, functools.partial(add_queries, masked=True), carry)
        carry = lax.fori_loop(unmasked, end, functools.partial(add_queries, masked=False), carry)
        d_q_BNTH, d_k_BNSH, d_v_BNSH = carry
        return d_q_BNTH, (d_k_BNSH.astype(k_BNSH.dtype), d_v_BNSH.astype(v_BNSH.dtype))

    start_BNTH = jnp.zeros(q_BNTH.shape, wide)
    d_q_BNTH, d_keys_values = lax.scan(visit_keys, start_BNTH, jnp.arange(k_BNSH.shape[2] // keys))
    return d_q_BNTH.astype(q_BNTH.dtype), *map(_join, d_keys_values)


def _mask(scores_BNTS: Array, first_BT: Array | None, i: Array, j: Array) -> Array:
    """Scores of block i of the queries and block j of the keys, the lowest number where a query does not see a key."""
    T, S = scores_BNTS.shape[2:]
    query_T, key_S = i * T + jnp.arange(T), j * S + jnp.arange(S)
    seen_BTS = (key_S <= query_T[:, None])[None]
    if first_BT is not None:
        seen_BTS &= key_S >= lax.dynamic_slice_in_dim(first_BT, i * T, T, axis=1)[..., None]
    return jnp.where(seen_BTS[:, None], scores_BNTS, _lowest(scores_BNTS))


def _lowest(x: Array) -> float:
    """Not -inf: of a query that sees no key of a block, the difference of two of these must be a number."""
    return jnp.finfo(x.dtype).min


def _block(x_BNT: Array, i: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(x_BNT, i * block, block, axis=2)


def _join(blocks: Array) -> Array:
    """[blocks, B, N, t, ...] to [B, N, T, ...]."""
    x = jnp.moveaxis(blocks, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
