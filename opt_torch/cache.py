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


class Slots(NamedTuple):
    """Where the T tokens of a call go in a cache, and what they see there; the same for all layers."""

    lengths_B: Tensor  # filled before the call
    index: tuple  # of the tokens in a buffer: of [B, N, T, H] if it is slices, else of [B, T, N, H]
    seen: int | None = None  # slots that any token sees, where the host knows it without waiting: on a CPU
    sees_all: bool = False  # each token sees all of them


def init_cache(config: OPTConfig, batch_size: int, capacity: int, *, dtype, device=None, head_parts: int = 1) -> Cache:
    """An empty cache for `batch_size` rows of up to `capacity` tokens, of one of so many parts of the heads."""

    def buffers() -> tuple[Tensor, ...]:
        heads = (config.heads_of(layer) // head_parts for layer in range(config.num_hidden_layers))
        shapes = ((batch_size, N, capacity, config.head_size) for N in heads)
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)

    return Cache(buffers(), buffers(), torch.zeros(batch_size, dtype=torch.int64, device=device))


def grow(cache: Cache, tokens: int) -> Cache:
    """A cache whose buffers have `tokens` more slots, zero-filled; the type stays."""

    def longer(buffer_BNSH: Tensor) -> Tensor:
        return torch.nn.functional.pad(buffer_BNSH, (0, 0, 0, tokens))

    return type(cache)(tuple(map(longer, cache.keys)), tuple(map(longer, cache.values)), cache.lengths)


def slots_behind(lengths_B: Tensor, T: int) -> Slots:
    """The T slots behind the filled ones of each row."""
    seen = None
    if lengths_B.device.type == "cpu" and not torch.compiler.is_compiling() and len(lengths_B):
        least, most = map(int, lengths_B.aminmax())
        seen = most + T
        if least == most:
            return Slots(lengths_B, (slice(None), slice(None), slice(most, seen)), seen, sees_all=T == 1)
    rows_B1 = torch.arange(len(lengths_B), device=lengths_B.device)[:, None]
    slots_BT = lengths_B[:, None] + torch.arange(T, device=lengths_B.device)
    return Slots(lengths_B, (rows_B1, slice(None), slots_BT), seen)


def write(buffer_BNSH: Tensor, x_BNTH: Tensor, slots: Slots) -> Tensor:
    """Puts the T tokens of a call into their slots; in place where no gradient needs the old buffer."""
    if torch.is_grad_enabled() and (x_BNTH.requires_grad or buffer_BNSH.requires_grad):
        buffer_BNSH = buffer_BNSH.clone()
    x_BTNH = x_BNTH if isinstance(slots.index[0], slice) else x_BNTH.transpose(1, 2)
    buffer_BNSH[slots.index] = x_BTNH.to(buffer_BNSH.dtype)  # under autocast they differ
    return buffer_BNSH


def with_capacity(cache: Cache, capacity: int) -> Cache:
    """The same tokens in a cache of a fixed, larger capacity."""
    return Cache(*grow(cache, capacity - cache.capacity))


def reorder(cache: Cache, rows_Q: Tensor) -> Cache:
    """The rows of a cache by index; they may repeat, and their number may change."""
    keys, values = (tuple(buffer[rows_Q] for buffer in buffers) for buffers in (cache.keys, cache.values))
    return type(cache)(keys, values, cache.lengths[rows_Q])
