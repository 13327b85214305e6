"""The key and value cache, JAX.

A row holds its real tokens without gaps, whatever the padding was: slot s of row b is the key of the token at position
s. `lengths` says how many slots of each row are filled; what lies behind them is never read. Buffers start at zero,
since a NaN in an unread slot would still reach the output as 0 x NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

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

    def buffers() -> tuple[Array, ...]:
        heads = (config.heads_of(layer) for layer in range(config.num_hidden_layers))
        return tuple(jnp.zeros((batch_size, N, capacity, config.head_size), dtype, device=device) for N in heads)

    return Cache(buffers(), buffers(), jnp.zeros(batch_size, jnp.int32, device=device))


def grow(cache: Cache, tokens: int) -> Cache:
    """A cache whose buffers have `tokens` more slots, zero-filled; the type stays."""

    def longer(buffer_BNSH: Array) -> Array:
        return jnp.pad(buffer_BNSH, ((0, 0), (0, 0), (0, tokens), (0, 0)))

    return type(cache)(tuple(map(longer, cache.keys)), tuple(map(longer, cache.values)), cache.lengths)


@jax.custom_jvp
def write(buffer_BNSH: Array, x_BNTH: Array, lengths_B: Array) -> Array:
    """Puts T new tokens behind the filled slots of each row; what lies beyond the capacity (padding) is dropped.

    bfloat16 is moved as integers: XLA on a CPU (jax 0.10) would widen the whole buffer to scatter a few values into it.
    """
    bits_BNTH = as_bits(x_BNTH.astype(buffer_BNSH.dtype))
    return from_bits(_scatter(as_bits(buffer_BNSH), bits_BNTH, lengths_B), buffer_BNSH.dtype)


@write.defjvp
def _write_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    d_buffer_BNSH, d_x_BNTH, _ = tangents
    return write(*primals), _scatter(d_buffer_BNSH, d_x_BNTH.astype(d_buffer_BNSH.dtype), primals[2])


def _scatter(buffer_BNSH: Array, x_BNTH: Array, lengths_B: Array) -> Array:
    """An index for each head: by row and slot alone, XLA updates a batch of one row in copies (CPU, jax 0.10)."""
    B, N, T, _ = x_BNTH.shape
    slots_B1T = (lengths_B[:, None] + jnp.arange(T))[:, None]
    return buffer_BNSH.at[jnp.arange(B)[:, None, None], jnp.arange(N)[:, None], slots_B1T].set(
        x_BNTH, mode="drop", unique_indices=True
    )


def as_bits(x: Array) -> Array:
    """bfloat16 as the integers of its bits, anything else as it is."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: Array, dtype) -> Array:
    """The inverse of `as_bits`."""
    return lax.bitcast_convert_type(x, dtype) if dtype == jnp.bfloat16 else x


def with_capacity(cache: Cache, capacity: int) -> Cache:
    """The same tokens in a cache of a fixed, larger capacity."""
    return Cache(*grow(cache, capacity - cache.capacity))


def reorder(cache: Cache, rows_Q: Array) -> Cache:
    """The rows of a cache by index; they may repeat, and their number may change."""
    keys, values = (tuple(buffer[rows_Q] for buffer in buffers) for buffers in (cache.keys, cache.values))
    return type(cache)(keys, values, cache.lengths[rows_Q])
