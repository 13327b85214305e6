"""Attention of a few new tokens to a long cache as two Triton kernels, which read only the filled slots.

A step has few queries and many keys, so the keys of a row are split among programs, each of which leaves a partial
softmax; the second kernel merges them (flash-decoding: Dao et al., https://pytorch.org/blog/flash-decoding/, and
Milakov and Gimelshein, arXiv:1805.02867, for the running maximum). How many slots are filled is read on the device: the
launch depends on shapes alone, as a CUDA graph needs it. No gradient. Nothing here is imported without Triton.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of the keys, and of the values, that a program holds at once: 64 registers a thread for both
SPLIT_SLOTS = 128  # a split has at least that many of the capacity
PROGRAMS_PER_PROCESSOR = 4  # a program is 4 warps, which wait for memory most of the time


def decode_attention(
    q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, lengths_B: Tensor, *, splits: int | None = None
) -> Tensor:
    """Attention of T tokens that follow `lengths_B` cached ones, in [B, N, T, H] of the queries' dtype.

    Query t of row b sees the slots 0 to lengths_B[b] + t, which hold its own key. The queries are scaled already; sums
    are in float32. `splits` is a power of two; by default as many as keep the device busy.
    """
    (B, N, T, H), S = q_BNTH.shape, k_BNSH.shape[2]
    q_BNTH = q_BNTH.contiguous()
    k_BNSH, v_BNSH = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_BNSH, v_BNSH))
    splits = number_of_splits(B * N * T, S, _processors(q_BNTH.device)) if splits is None else splits
    partial_RPH = torch.empty(B * N * T, splits, H, dtype=torch.float32, device=q_BNTH.device)
    sums_RP = torch.empty(B * N * T, splits, dtype=torch.float32, device=q_BNTH.device)
    out_BNTH, block_H = torch.empty_like(q_BNTH), triton.next_power_of_2(H)  # the rest is masked
    partial_attention[(B * N * T, splits)](
        *(q_BNTH, k_BNSH, v_BNSH, lengths_B, partial_RPH, sums_RP),
        *(*k_BNSH.stride()[:3], *v_BNSH.stride()[:3], N, T, S),
        **dict(H=H, SPLITS=splits, BLOCK_S=TILE // block_H, BLOCK_H=block_H),
    )
    merge_partials[(B * N * T,)](partial_RPH, sums_RP, out_BNTH, H=H, SPLITS=splits, BLOCK_H=block_H)
    return out_BNTH


def number_of_splits(rows: int, capacity: int, processors: int) -> int:
    """A power of two: enough programs for the device, but none for fewer than `SPLIT_SLOTS` slots of the capacity."""
    wanted = min(-(-PROGRAMS_PER_PROCESSOR * processors // rows), -(-capacity // SPLIT_SLOTS))
    return triton.next_power_of_2(max(1, wanted))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def partial_attention(
    q_ptr, k_ptr, v_ptr, lengths_ptr, partial_ptr, sums_ptr,
    k_stride_B, k_stride_N, k_stride_S, v_stride_B, v_stride_N, v_stride_S, N, T, S,
    H: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One query and one split of its slots: the weighted mean of their values, and the logarithm of their weights' sum.

    A split without slots leaves a logarithm of -inf, and its mean unwritten.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)  # int64: a large cache has more than 2^31 elements
    b, n, t = row // (N * T), row // T % N, row % T
    length = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32) + t.to(tl.int32) + 1, S)
    slots = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
    start = split * slots
    stop = tl.minimum(start + slots, length)

    h = tl.arange(0, BLOCK_H)
    q_H = tl.load(q_ptr + row * H + h, mask=h < H, other=0).to(tl.float32)
    k_ptr += b * k_stride_B + n * k_stride_N
    v_ptr += b * v_stride_B + n * v_stride_N
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    mean_H = tl.zeros([BLOCK_H], tl.float32)
    for first in range(start, stop, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        read = (s < stop)[:, None] & (h < H)[None, :]
        s = s.to(tl.int64)
        k_SH = tl.load(k_ptr + s[:, None] * k_stride_S + h[None, :], mask=read, other=0).to(tl.float32)
        v_SH = tl.load(v_ptr + s[:, None] * v_stride_S + h[None, :], mask=read, other=0).to(tl.float32)
        scores_S = tl.where(s < stop, tl.sum(q_H[None, :] * k_SH, axis=1), float("-inf"))
        larger = tl.maximum(largest, tl.max(scores_S, axis=0))
        weights_S = tl.exp(scores_S - larger)
        before = tl.exp(largest - larger)
        total = total * before + tl.sum(weights_S, axis=0)
        mean_H = mean_H * before + tl.sum(weights_S[:, None] * v_SH, axis=0)
        largest = larger
    if stop > start:
        tl.store(sums_ptr + row * SPLITS + split, largest + tl.log(total))
        tl.store(partial_ptr + (row * SPLITS + split) * H + h, mean_H / total, mask=h < H)
    else:
        tl.store(sums_ptr + row * SPLITS + split, float("-inf"))


@triton.jit
def merge_partials(
    partial_ptr, sums_ptr, out_ptr, H: tl.constexpr, SPLITS: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """The mean of the splits' means of one query, by the sums of their weights; the first split is never empty."""
    row = tl.program_id(0).to(tl.int64)
    p, h = tl.arange(0, SPLITS), tl.arange(0, BLOCK_H)
    sums_P = tl.load(sums_ptr + row * SPLITS + p)
    weights_P = tl.exp(sums_P - tl.max(sums_P, axis=0))
    read = (sums_P != float("-inf"))[:, None] & (h < H)[None, :]
    partial_PH = tl.load(partial_ptr + (row * SPLITS + p)[:, None] * H + h[None, :], mask=read, other=0)
    out_H = tl.sum(weights_P[:, None] * partial_PH, axis=0) / tl.sum(weights_P, axis=0)
    tl.store(out_ptr + row * H + h, out_H.to(out_ptr.dtype.element_ty), mask=h < H)
