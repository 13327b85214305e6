"""Runs of tokens that attend among themselves, PyTorch: the documents of a packed batch, without its padding.

Kernels of variable length take the tokens of a batch as one sequence of R and the places where a run begins, and so
compute nothing for padding, nor between documents.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Segments(NamedTuple):
    """Which tokens of [B, T] are real, and where runs of them begin; the same for all layers of a pass."""

    index_R: Tensor  # int64, where the real tokens lie in B x T
    starts: Tensor  # int32, one more than there are runs: the first token of each among R, then R
    longest: int  # tokens of the longest run


def make_segments(B: int, T: int, first_BT: Tensor | None, lengths_B: Tensor | None, device) -> Segments:
    """A run begins where a query sees itself alone, first_BT[b, t] == t; behind `lengths_B` tokens a row is padding.

    The sizes of the result depend on values, so the host waits for the device.
    """
    place_T = torch.arange(T, device=device)
    real_BT = (place_T < (T if lengths_B is None else lengths_B[:, None])).expand(B, T)
    begins_BT = (place_T == 0).expand(B, T) if first_BT is None else first_BT == place_T
    index_R = real_BT.flatten().nonzero()[:, 0]
    starts = begins_BT.flatten()[index_R].nonzero()[:, 0]
    starts = F.pad(starts, (0, 1), value=len(index_R))
    return Segments(index_R, starts.to(torch.int32), int(starts.diff().max()) if len(index_R) else 0)


def attention_by_segment(
    attention: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor], q_BNTH, k_BNTH, v_BNTH, segments: Segments
) -> Tensor:
    """Runs `attention(q, k, v [R, N, H], starts, longest)` on the real tokens alone; zero [B, N, T, H] elsewhere."""
    B, N, T, H = q_BNTH.shape
    out_BTNH = q_BNTH.new_zeros(B, T, N, H)
    if segments.longest:
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNTH, k_BNTH, v_BNTH))
        qkv_RNH = (x.index_select(0, segments.index_R) for x in rows)  # x[index] would sort in its backward on a GPU
        out_RNH = attention(*qkv_RNH, segments.starts, segments.longest)
        out_BTNH = out_BTNH.flatten(0, 1).index_copy(0, segments.index_R, out_RNH).view(B, T, N, H)
    return out_BTNH.transpose(1, 2)


def one_by_one(dropout: float, q_RNH: Tensor, k_RNH: Tensor, v_RNH: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Causal attention of each run by a call of its own: what a CPU has for lack of such a kernel."""
    sizes = starts.diff().tolist()
    parts = zip(*(x.transpose(0, 1)[None].split(sizes, dim=2) for x in (q_RNH, k_RNH, v_RNH)), strict=True)
    out = [F.scaled_dot_product_attention(*p, is_causal=True, scale=1.0, dropout_p=dropout) for p in parts]
    return torch.cat(out, dim=2)[0].transpose(0, 1)
