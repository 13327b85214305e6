"""Left-packing of the real tokens, TensorFlow: it makes the causal flag the only mask that a kernel needs.

A stable sort puts the real tokens of a row first. Their order, and so their positions, stay as they were; padding
follows them, where no real query looks. This holds for left padding, right padding and holes alike.
"""

from typing import NamedTuple

import tensorflow as tf
from tensorflow import Tensor

from opt_tf.layers import dims


class Packing(NamedTuple):
    order_BT: Tensor  # packed column -> column
    inverse_BT: Tensor  # column -> packed column
    real_BT: Tensor  # True: a real token, before packing
    lengths_B: Tensor  # real tokens of each row


def make_packing(attention_mask: Tensor) -> Packing:
    """Orders the columns of a [B, T] mask (nonzero: a real token) so that real tokens come first."""
    real_BT = tf.cast(attention_mask, tf.bool)
    order_BT = tf.argsort(tf.cast(~real_BT, tf.int32), axis=1, stable=True)
    inverse_BT = tf.argsort(order_BT, axis=1)
    return Packing(order_BT, inverse_BT, real_BT, tf.reduce_sum(tf.cast(real_BT, tf.int64), axis=1))


def pack(x_BTD: Tensor, packing: Packing | None) -> Tensor:
    """Moves the real tokens of each row to its left, zero behind them; the identity without padding.

    Zero, since a kernel weighs what it must not see with 0, and 0 x NaN is NaN.
    """
    if packing is None:
        return x_BTD
    x_BTD = tf.where(packing.real_BT[..., None], x_BTD, tf.zeros([], x_BTD.dtype))
    return _take_columns(x_BTD, packing.order_BT)


def unpack(x_BTD: Tensor, packing: Packing | None) -> Tensor:
    """Moves every token back to its column; the rows of padding become zero."""
    if packing is None:
        return x_BTD
    x_BTD = _take_columns(x_BTD, packing.inverse_BT)
    return tf.where(packing.real_BT[..., None], x_BTD, tf.zeros([], x_BTD.dtype))


def unpack_attentions(weights_BNTS: Tensor, packing: Packing | None, *, keys_too: bool) -> Tensor:
    """Moves the queries back to their columns, and the keys too where they are tokens of this call, not cache slots."""
    if packing is None:
        return weights_BNTS
    weights_BNTS = tf.gather(weights_BNTS, packing.inverse_BT, axis=2, batch_dims=1)
    if keys_too:
        weights_BNTS = tf.gather(weights_BNTS, packing.inverse_BT, axis=3, batch_dims=1)
    return tf.where(packing.real_BT[:, None, :, None], weights_BNTS, tf.zeros([], weights_BNTS.dtype))


def first_columns(segment_ids: Tensor, packing: Packing | None) -> Tensor:
    """The packed column [B, T] at which the document of each token begins; a document is a run of one id."""
    if packing is not None:
        segment_ids = tf.gather(segment_ids, packing.order_BT, axis=1, batch_dims=1)
    begins_BT = tf.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [[0, 0], [1, 0]], constant_values=True)
    T = dims(segment_ids)[1]
    beginnings_BT = tf.sort(tf.where(begins_BT, tf.range(T), T), axis=1)  # of document 0, 1, ..., then T
    documents_BT = tf.cumsum(tf.cast(begins_BT, tf.int32), axis=1) - 1
    return tf.gather(beginnings_BT, documents_BT, axis=1, batch_dims=1)


def pool_last_token(hidden_BTE: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The hidden state [B, E] of the last real token of each row; zero for a row without one."""
    if mask_BT is None:
        return hidden_BTE[:, -1]
    real_BT = tf.cast(mask_BT, tf.bool)
    columns_BT = tf.range(dims(hidden_BTE)[1]) * tf.cast(real_BT, tf.int32)
    pooled_BE = tf.gather(hidden_BTE, tf.argmax(columns_BT, axis=1), axis=1, batch_dims=1)
    return tf.where(tf.reduce_any(real_BT, axis=1, keepdims=True), pooled_BE, tf.zeros([], pooled_BE.dtype))


def _take_columns(x_BTD: Tensor, columns_BT: Tensor) -> Tensor:
    return tf.gather(x_BTD, columns_BT, axis=1, batch_dims=1)
