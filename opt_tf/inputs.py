"""What a user passes, as TensorFlow tensors; and what is known of it, for the checks that the backends share."""

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core.checks import Known, KnownCache, array_of, check_cache
from opt_tf.cache import Cache, GrowingCache


def as_tensor(x, dtype=None) -> Tensor | None:
    """A tensor of an array of TensorFlow or NumPy, or of nested lists; None stays None."""
    if x is None or isinstance(x, keras.KerasTensor):
        return x
    x = tf.convert_to_tensor(x if tf.is_tensor(x) else array_of(x))
    return x if dtype is None else tf.cast(x, dtype)


def as_index(x) -> Tensor | None:
    """An index tensor, int64; an array of floats stays as it is, for the checks to refuse."""
    x = as_tensor(x)
    return x if x is None or x.dtype.is_floating else tf.cast(x, tf.int64)


def known(x: Tensor | None, *, values: bool = True) -> Known | None:
    """Shape and dtype; the values too, unless a function is being traced, or they are not worth reading."""
    if x is None:
        return None
    shape = (None, None) if x.shape.rank is None else tuple(x.shape)
    if not values or not tf.executing_eagerly():
        return Known(shape, x.dtype.name)
    array = x.numpy()
    return Known(shape, x.dtype.name, array.astype(np.float32) if x.dtype.is_floating else array)


def known_cache(cache: Cache | None) -> KnownCache | None:
    if cache is None:
        return None
    check_cache(cache, Cache)
    capacity = None if isinstance(cache, GrowingCache) else cache.capacity
    lengths = known(cache.lengths)
    layers = tuple((buffer.shape[1], buffer.shape[3]) for buffer in cache.keys)
    return KnownCache(cache.batch_size, capacity, lengths.values, layers)
