"""What a user passes, as JAX arrays; and what is known of it, for the checks that the backends share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from opt_core.checks import Known, KnownCache, array_of, check_cache
from opt_flax.cache import Cache, GrowingCache


def as_tensor(x, dtype=None) -> Array | None:
    """An array of one of JAX or NumPy, or of nested lists; None stays None."""
    if x is None:
        return None
    return jnp.asarray(x if isinstance(x, jax.Array) else array_of(x), dtype)


def as_index(x) -> Array | None:
    """An index array, int32; an array of floats stays as it is, for the checks to refuse."""
    if x is None or isinstance(x, jax.Array):
        return x if x is None or jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.int32)
    x = array_of(x)
    if np.issubdtype(x.dtype, np.integer):  # a wider integer must not wrap into the range
        x = np.clip(x, np.iinfo(np.int32).min, np.iinfo(np.int32).max).astype(np.int32)
    return as_index(jnp.asarray(x))


def known(x, *, values: bool = True) -> Known | None:
    """Shape and dtype; the values too, unless this is being compiled, or they are not worth reading."""
    if x is None:
        return None
    x = x if isinstance(x, jax.Array) else array_of(x)
    dtype = str(x.dtype)
    if not values or not is_readable(x):
        return Known(tuple(x.shape), dtype)
    x = np.asarray(x)
    return Known(x.shape, dtype, x.astype(np.float32) if dtype == "bfloat16" else x)


def is_readable(x) -> bool:
    """Whether the values are there to be read: not those of what is being compiled, or of other processes alone."""
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def known_cache(cache: Cache | None) -> KnownCache | None:
    if cache is None:
        return None
    check_cache(cache, Cache)
    capacity = None if isinstance(cache, GrowingCache) else cache.capacity
    lengths = known(cache.lengths)
    layers = tuple((buffer.shape[1], buffer.shape[3]) for buffer in cache.keys)
    return KnownCache(cache.batch_size, capacity, lengths.values, layers)
