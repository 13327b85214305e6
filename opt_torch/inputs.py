"""What a user passes, as PyTorch tensors; and what is known of it, for the checks that the backends share."""

import torch
from torch import Tensor

from opt_core.checks import Known, KnownCache, array_of, check_cache
from opt_torch.cache import Cache, GrowingCache


def as_tensor(x, device, dtype=None) -> Tensor | None:
    """A tensor of an array of PyTorch or NumPy, or of nested lists; None stays None."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        array = array_of(x)
        x = torch.as_tensor(array if array.flags.writeable else array.copy(), device=device)  # or PyTorch would warn
    return x if dtype is None else x.to(dtype)


def as_index(x, device) -> Tensor | None:
    """An index tensor, int64; an array of floats stays as it is, for the checks to refuse."""
    x = as_tensor(x, device)
    return x if x is None or x.is_floating_point() else x.long()


def known(x: Tensor | None, *, values: bool = True) -> Known | None:
    """Shape and dtype; the values too, unless this is being compiled, or they are not worth reading."""
    if x is None:
        return None
    dtype = str(x.dtype).removeprefix("torch.")
    if not values or torch.compiler.is_compiling() or x.is_meta:
        return Known(tuple(x.shape), dtype)
    x = x.detach().float() if x.dtype == torch.bfloat16 else x.detach()  # NumPy has no bfloat16
    return Known(tuple(x.shape), dtype, x.cpu().numpy())


def known_cache(cache: Cache | None, head_parts: int = 1) -> KnownCache | None:
    """Of a device that holds one of so many parts of the heads."""
    if cache is None:
        return None
    check_cache(cache, Cache)
    capacity = None if isinstance(cache, GrowingCache) else cache.capacity
    lengths = known(cache.lengths)
    layers = tuple((buffer.shape[1] * head_parts, buffer.shape[3]) for buffer in cache.keys)
    return KnownCache(cache.batch_size, capacity, lengths.values, layers)
