"""The key and value cache, JAX.

A row holds its real tokens without gaps, whatever the padding was: slot s of row b is the key of the token at position
s. `lengths` says how many slots of each row are filled; what lies behind them is never read. Buffers start at zero,
since a NaN in an unread slot would still reach the output as 0 x NaN.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from opt_core.config import OPTConfig


class Cache(NamedTuple):
    """Preallocated buffers of a fixed capacity S. A call returns a new cache; the one it was given stays as it was.

    A compiled function that donates the cache (`jax.jit(..., donate_argnames="cache")`) writes it in place.
    """

    keys: tuple[Array, ...]  # L buffers [B, N, S, H]
    values: tuple[Array, ...]  # L buffers [B, N, S, H]
    lengths: Array  # [B] int32, filled slots

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0


class GrowingCache(Cache):
    """Buffers that grow with every call by the tokens of that call: what `use_cache` makes when no cache was passed."""


def init_cache(config: OPTConfig, batch_size: int, capacity: int, *, dtype, device=None) -> Cache:
    """An empty cache for `batch_size` rows of up to `capacity` tokens."""
    shape = (batch_size, config.num_attention_heads, capacity, config.head_size)

    def buffers() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, dtype, device=device) for _ in range(config.num_hidden_layers))

    return Cache(buffers(), buffers(), jnp.zeros(batch_size, jnp.int32, device=device))


def grow(cache: Cache, tokens: int) -> Cache:
    """A cache whose buffers have `tokens` more slots, zero-filled; the type stays."""

    def longer(buffer_BNSH: Array) -> Array:
        return jnp.pad(buffer_BNSH, ((0, 0), (0, 0), (0, tokens), (0, 0)))

    return type(cache)(tuple(map(longer, cache.keys)), tuple(map(longer, cache.values)), cache.lengths)


def write(buffer_BNSH: Array, x_BNTH: Array, lengths_B: Array) -> Array:
    """Puts T new tokens behind the filled slots of each row; what lies beyond the capacity (padding) is dropped."""
    rows_B1 = jnp.arange(len(lengths_B))[:, None]
    slots_BT = lengths_B[:, None] + jnp.arange(x_BNTH.shape[2])
    return buffer_BNSH.at[rows_B1, :, slots_BT].set(x_BNTH.swapaxes(1, 2), mode="drop")


def with_capacity(cache: Cache, capacity: int) -> Cache:
    """The same tokens in a cache of a fixed, larger capacity."""
    return Cache(*grow(cache, capacity - cache.capacity))


def reorder(cache: Cache, rows_Q: Array) -> Cache:
    """The rows of a cache by index; they may repeat, and their number may change."""
    keys, values = (tuple(buffer[rows_Q] for buffer in buffers) for buffers in (cache.keys, cache.values))
    return type(cache)(keys, values, cache.lengths[rows_Q])
