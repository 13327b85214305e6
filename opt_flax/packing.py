"""Left-packing of the real tokens, JAX: it makes the causal flag the only mask that a kernel needs.

A stable sort puts the real tokens of a row first. Their order, and so their positions, stay as they were; padding
follows them, where no real query looks. This holds for left padding, right padding and holes alike.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Packing(NamedTuple):
    order_BT: Array  # packed column -> column
    inverse_BT: Array  # column -> packed column
    real_BT: Array  # True: a real token, before packing
    lengths_B: Array  # real tokens of each row


@jax.jit
def make_packing(attention_mask: Array) -> Packing:
    """Orders the columns of a [B, T] mask (nonzero: a real token) so that real tokens come first."""
    real_BT = attention_mask != 0
    order_BT = jnp.argsort(~real_BT, axis=1, stable=True)
    return Packing(order_BT, jnp.argsort(order_BT, axis=1), real_BT, real_BT.sum(1, dtype=jnp.int32))


@jax.jit
def pack(x_BTD: Array, packing: Packing | None) -> Array:
    """Moves the real tokens of each row to its left, zero behind them; the identity without padding.

    Zero, since a kernel weighs what it must not see with 0, and 0 x NaN is NaN.
    """
    if packing is None:
        return x_BTD
    return _take_columns(jnp.where(packing.real_BT[..., None], x_BTD, 0), packing.order_BT)


@jax.jit
def unpack(x_BTD: Array, packing: Packing | None) -> Array:
    """Moves every token back to its column; the rows of padding become zero."""
    if packing is None:
        return x_BTD
    return jnp.where(packing.real_BT[..., None], _take_columns(x_BTD, packing.inverse_BT), 0)


@functools.partial(jax.jit, static_argnames="keys_too")
def unpack_attentions(weights_BNTS: Array, packing: Packing | None, *, keys_too: bool) -> Array:
    """Moves the queries back to their columns, and the keys too where they are tokens of this call, not cache slots."""
    if packing is None:
        return weights_BNTS
    weights_BNTS = jnp.take_along_axis(weights_BNTS, packing.inverse_BT[:, None, :, None], 2)
    if keys_too:
        weights_BNTS = jnp.take_along_axis(weights_BNTS, packing.inverse_BT[:, None, None, :], 3)
    return jnp.where(packing.real_BT[:, None, :, None], weights_BNTS, 0)


@jax.jit
def first_columns(segment_ids: Array, packing: Packing | None) -> Array:
    """The packed column [B, T] at which the document of each token begins; a document is a run of one id."""
    if packing is not None:
        segment_ids = jnp.take_along_axis(segment_ids, packing.order_BT, 1)
    begins_BT = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    columns_T = jnp.arange(segment_ids.shape[1])
    return lax.cummax(jnp.where(begins_BT, columns_T, 0), axis=1)


def pool_last_token(hidden_BTE: Array, mask_BT: Array | None) -> Array:
    """The hidden state [B, E] of the last real token of each row; zero for a row without one."""
    if mask_BT is None:
        return hidden_BTE[:, -1]
    columns_BT = jnp.arange(hidden_BTE.shape[1]) * (mask_BT != 0)
    pooled_BE = jnp.take_along_axis(hidden_BTE, columns_BT.argmax(1)[:, None, None], 1)[:, 0]
    return jnp.where((mask_BT != 0).any(1, keepdims=True), pooled_BE, 0)


def _take_columns(x_BTD: Array, columns_BT: Array) -> Array:
    return jnp.take_along_axis(x_BTD, columns_BT[..., None], 1)
