"""The key and value cache, PyTorch.

A row holds its real tokens without gaps, whatever the padding was: slot s of row b is the key of the token at position
s. `lengths` says how many slots of each row are filled; what lies behind them is never read. Buffers start at zero,
since a NaN in an unread slot would still reach the output as 0 x NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from opt_core.config import OPTConfig


class Cache(NamedTuple):
    """Preallocated buffers of a fixed capacity S. A call writes into them in place and returns the new lengths."""

    keys: tuple[Tensor, ...]  # L buffers [B, N, S, H]
    values: tuple[Tensor, ...]  # L buffers [B, N, S, H]
    lengths: Tensor  # [B] int64, filled slots

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

    def buffers() -> tuple[Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers))

    return Cache(buffers(), buffers(), torch.zeros(batch_size, dtype=torch.int64, device=device))


def grow(cache: Cache, tokens: int) -> Cache:
    """A cache whose buffers have `tokens` more slots, zero-filled; the type stays."""

    def longer(buffer_BNSH: Tensor) -> Tensor:
        return torch.nn.functional.pad(buffer_BNSH, (0, 0, 0, tokens))

    return type(cache)(tuple(map(longer, cache.keys)), tuple(map(longer, cache.values)), cache.lengths)


def write(buffer_BNSH: Tensor, x_BNTH: Tensor, lengths_B: Tensor) -> Tensor:
    """Puts T new tokens behind the filled slots of each row; in place where no gradient needs the old buffer."""
    rows_B1 = torch.arange(len(lengths_B), device=lengths_B.device)[:, None]
    slots_BT = lengths_B[:, None] + torch.arange(x_BNTH.shape[2], device=lengths_B.device)
    index = (rows_B1, slice(None), slots_BT)
    if torch.is_grad_enabled() and (x_BNTH.requires_grad or buffer_BNSH.requires_grad):
        buffer_BNSH = buffer_BNSH.clone()
    buffer_BNSH[index] = x_BNTH.transpose(1, 2).to(buffer_BNSH.dtype)  # under autocast they differ
    return buffer_BNSH


def with_capacity(cache: Cache, capacity: int) -> Cache:
    """The same tokens in a cache of a fixed, larger capacity."""
    return Cache(*grow(cache, capacity - cache.capacity))


def reorder(cache: Cache, rows_Q: Tensor) -> Cache:
    """The rows of a cache by index; they may repeat, and their number may change."""
    keys, values = (tuple(buffer[rows_Q] for buffer in buffers) for buffers in (cache.keys, cache.values))
    return type(cache)(keys, values, cache.lengths[rows_Q])
