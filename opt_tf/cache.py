"""The key and value cache, TensorFlow.

A row holds its real tokens without gaps, whatever the padding was: slot s of row b is the key of the token at position
s. `lengths` says how many slots of each row are filled; what lies behind them is never read. Buffers start at zero,
since a NaN in an unread slot would still reach the output as 0 x NaN.
"""

from typing import NamedTuple

import tensorflow as tf
from tensorflow import Tensor

from opt_core.config import OPTConfig
from opt_tf.layers import dims, on_mesh


class Cache(NamedTuple):
    """Preallocated buffers of a fixed capacity S. A call leaves them as they are and returns new ones."""

    keys: tuple[Tensor, ...]  # L buffers [B, N, S, H]
    values: tuple[Tensor, ...]  # L buffers [B, N, S, H]
    lengths: Tensor  # [B] int64, filled slots

    @property
    def batch_size(self) -> int | None:
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int | None:
        return self.keys[0].shape[2] if self.keys else 0


class GrowingCache(Cache):
    """Buffers that grow with every call by the tokens of that call: what `use_cache` makes when no cache was passed."""


def init_cache(config: OPTConfig, batch_size: int, capacity: int, *, dtype, device=None) -> Cache:
    """An empty cache for `batch_size` rows of up to `capacity` tokens."""

    def buffers() -> tuple[Tensor, ...]:
        heads = (config.heads_of(layer) for layer in range(config.num_hidden_layers))
        return tuple(tf.zeros((batch_size, N, capacity, config.head_size), dtype) for N in heads)

    with tf.device(device):
        return Cache(buffers(), buffers(), tf.zeros([batch_size], tf.int64))


def grow(cache: Cache, tokens: int | Tensor) -> Cache:
    """A cache whose buffers have `tokens` more slots, zero-filled; the type stays."""

    def longer(buffer_BNSH: Tensor) -> Tensor:
        return tf.pad(buffer_BNSH, [[0, 0], [0, 0], [0, tokens], [0, 0]])

    return type(cache)(tuple(map(longer, cache.keys)), tuple(map(longer, cache.values)), cache.lengths)


def write(buffer_BNSH: Tensor, x_BNTH: Tensor, lengths_B: Tensor) -> Tensor:
    """The buffer with T new tokens behind the filled slots of each row."""
    B, N, T, _ = dims(x_BNTH)
    if on_mesh():
        return _write_on_mesh(buffer_BNSH, x_BNTH, lengths_B)
    rows_BNT = tf.broadcast_to(tf.range(B, dtype=tf.int64)[:, None, None], [B, N, T])
    heads_BNT = tf.broadcast_to(tf.range(N, dtype=tf.int64)[None, :, None], [B, N, T])
    slots_BT = lengths_B[:, None] + tf.range(T, dtype=tf.int64)
    slots_BNT = tf.broadcast_to(slots_BT[:, None], [B, N, T])
    index = tf.stack([rows_BNT, heads_BNT, slots_BNT], axis=-1)
    return tf.tensor_scatter_nd_update(buffer_BNSH, index, tf.cast(x_BNTH, buffer_BNSH.dtype))


def _write_on_mesh(buffer_BNSH: Tensor, x_BNTH: Tensor, lengths_B: Tensor) -> Tensor:
    """The same without a scatter, which ends the process where the heads are cut (DTensor of TensorFlow 2.21)."""
    S, T = buffer_BNSH.shape[2], x_BNTH.shape[2]
    token_BS = tf.range(S, dtype=tf.int64) - lengths_B[:, None]
    new_BNSH = tf.gather(x_BNTH, tf.clip_by_value(token_BS, 0, T - 1), axis=2, batch_dims=1)
    is_new_BS = (token_BS >= 0) & (token_BS < T)
    return tf.where(is_new_BS[:, None, :, None], tf.cast(new_BNSH, buffer_BNSH.dtype), buffer_BNSH)


def with_capacity(cache: Cache, capacity: int) -> Cache:
    """The same tokens in a cache of a fixed, larger capacity."""
    return Cache(*grow(cache, capacity - cache.capacity))


def reorder(cache: Cache, rows_Q: Tensor) -> Cache:
    """The rows of a cache by index; they may repeat, and their number may change."""
    keys, values = (tuple(tf.gather(buffer, rows_Q) for buffer in buffers) for buffers in (cache.keys, cache.values))
    return type(cache)(keys, values, tf.gather(cache.lengths, rows_Q))
