"""Left-packing of the real tokens, PyTorch: it makes the causal flag the only mask that a kernel needs.

A stable sort puts the real tokens of a row first. Their order, and so their positions, stay as they were; padding
follows them, where no real query looks. This holds for left padding, right padding and holes alike.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Packing(NamedTuple):
    order_BT: Tensor  # packed column -> column
    inverse_BT: Tensor  # column -> packed column
    real_BT: Tensor  # True: a real token, before packing
    lengths_B: Tensor  # real tokens of each row


def make_packing(attention_mask: Tensor) -> Packing:
    """Orders the columns of a [B, T] mask (nonzero: a real token) so that real tokens come first."""
    real_BT = attention_mask != 0
    order_BT = torch.argsort((~real_BT).to(torch.int32), dim=1, stable=True)
    return Packing(order_BT, torch.argsort(order_BT, dim=1), real_BT, real_BT.sum(1))


def pack(x_BTD: Tensor, packing: Packing | None) -> Tensor:
    """Moves the real tokens of each row to its left, zero behind them; the identity without padding.

    Zero, since a kernel weighs what it must not see with 0, and 0 x NaN is NaN.
    """
    if packing is None:
        return x_BTD
    return _take_columns(torch.where(packing.real_BT[..., None], x_BTD, 0), packing.order_BT)


def unpack(x_BTD: Tensor, packing: Packing | None) -> Tensor:
    """Moves every token back to its column; the rows of padding become zero."""
    if packing is None:
        return x_BTD
    return torch.where(packing.real_BT[..., None], _take_columns(x_BTD, packing.inverse_BT), 0)


def unpack_attentions(weights_BNTS: Tensor, packing: Packing | None, *, keys_too: bool) -> Tensor:
    """Moves the queries back to their columns, and the keys too where they are tokens of this call, not cache slots."""
    if packing is None:
        return weights_BNTS
    weights_BNTS = torch.take_along_dim(weights_BNTS, packing.inverse_BT[:, None, :, None], 2)
    if keys_too:
        weights_BNTS = torch.take_along_dim(weights_BNTS, packing.inverse_BT[:, None, None, :], 3)
    return torch.where(packing.real_BT[:, None, :, None], weights_BNTS, 0)


def first_columns(segment_ids: Tensor, packing: Packing | None) -> Tensor:
    """The packed column [B, T] at which the document of each token begins; a document is a run of one id."""
    if packing is not None:
        segment_ids = torch.take_along_dim(segment_ids, packing.order_BT, 1)
    begins_BT = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    columns_T = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    return torch.where(begins_BT, columns_T, 0).cummax(1).values


def pool_last_token(hidden_BTE: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The hidden state [B, E] of the last real token of each row; zero for a row without one."""
    if mask_BT is None:
        return hidden_BTE[:, -1]
    columns_BT = torch.arange(hidden_BTE.shape[1], device=hidden_BTE.device) * (mask_BT != 0)
    pooled_BE = torch.take_along_dim(hidden_BTE, columns_BT.argmax(1)[:, None, None], 1)[:, 0]
    return torch.where((mask_BT != 0).any(1, keepdim=True), pooled_BE, 0)


def _take_columns(x_BTD: Tensor, columns_BT: Tensor) -> Tensor:
    return torch.take_along_dim(x_BTD, columns_BT[..., None], 1)
