"""Multi-head causal self-attention, PyTorch.

Three ways to attend, all on packed rows (`packing.py`), so that the causal flag is the only mask: fused over the tokens
of this call; over a cache, whose rows are prefixes; and step by step ("eager"), which alone can return the weights.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opt_core.config import OPTConfig
from opt_torch import cache
from opt_torch.layers import Linear

LayerCache = tuple[Tensor, Tensor]  # keys and values of one layer, [B, N, S, H] each


class Attention(nn.Module):
    """Queries at T positions attend to the keys at and before them (Vaswani et al., arXiv:1706.03762, section 3.2)."""

    def __init__(self, config: OPTConfig, attn_implementation: str):
        super().__init__()
        self.num_heads, self.head_size = config.num_attention_heads, config.head_size
        self.attn_implementation = attn_implementation
        self.dropout = config.attention_dropout
        shape = dict(bias=config.enable_bias, init_std=config.init_std)
        self.k_proj = Linear(config.hidden_size, config.hidden_size, **shape)
        self.v_proj = Linear(config.hidden_size, config.hidden_size, **shape)
        self.q_proj = Linear(config.hidden_size, config.hidden_size, **shape)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, **shape)

    def forward(
        self, x_BTD: Tensor, past: LayerCache | None, lengths_B: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, LayerCache, Tensor | None]:
        """Returns the output [B, T, D], the keys and values with those of this call, and the weights or None.

        `past` holds `lengths_B` filled slots a row; without it the tokens of this call are all there is.
        """
        q_BNTH = self.split_heads(self.q_proj(x_BTD) * self.head_size**-0.5)
        k_BNSH = self.split_heads(self.k_proj(x_BTD))
        v_BNSH = self.split_heads(self.v_proj(x_BTD))
        if past is not None:
            k_BNSH = cache.write(past[0], k_BNSH, lengths_B)
            v_BNSH = cache.write(past[1], v_BNSH, lengths_B)
        same = q_BNTH.dtype  # a cache may have another dtype; `to` copies nothing where it has not
        heads_BNTH, weights_BNTS = self.attend(q_BNTH, k_BNSH.to(same), v_BNSH.to(same), lengths_B, output_attentions)
        return self.out_proj(self.merge_heads(heads_BNTH)), (k_BNSH, v_BNSH), weights_BNTS

    def attend(self, q_BNTH, k_BNSH, v_BNSH, lengths_B, output_attentions) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if output_attentions or self.attn_implementation == "eager":
            return eager_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B, dropout)
        if lengths_B is not None:
            return cached_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B, dropout), None
        return causal_attention(q_BNTH, k_BNSH, v_BNSH, dropout), None

    def split_heads(self, x_BTA: Tensor) -> Tensor:
        return x_BTA.view(*x_BTA.shape[:2], self.num_heads, self.head_size).transpose(1, 2)

    def merge_heads(self, x_BNTH: Tensor) -> Tensor:
        return x_BNTH.transpose(1, 2).flatten(2)


def causal_attention(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, dropout: float = 0.0) -> Tensor:
    """Fused attention of T tokens among themselves, O(T) memory; the query is scaled already."""
    return F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True, scale=1.0, dropout_p=dropout)


def cached_attention(q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, lengths_B: Tensor, dropout: float = 0.0) -> Tensor:
    """Attention of T tokens that follow `lengths_B` cached ones, to themselves and to those."""
    if q_BNTH.device.type == "cpu" and q_BNTH.dtype != torch.float32:
        # SDPA with a mask is 5 times slower than the plain products for bfloat16 on a CPU (torch 2.13).
        return eager_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B, dropout)[0]
    mask_B1TS = attend_mask(q_BNTH.shape[2], k_BNSH.shape[2], lengths_B, q_BNTH.device)
    return F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, attn_mask=mask_B1TS, scale=1.0, dropout_p=dropout)


def eager_attention(
    q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, lengths_B: Tensor | None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention step by step; returns the output [B, N, T, H] and the weights [B, N, T, S], before dropout."""
    compute_dtype = torch.promote_types(q_BNTH.dtype, torch.float32)  # scores and softmax in float32 at least
    scores_BNTS = q_BNTH.to(compute_dtype) @ k_BNSH.to(compute_dtype).transpose(-1, -2)
    mask_B1TS = attend_mask(q_BNTH.shape[2], k_BNSH.shape[2], lengths_B, q_BNTH.device)
    scores_BNTS = scores_BNTS.masked_fill(~mask_B1TS, torch.finfo(scores_BNTS.dtype).min)
    weights_BNTS = torch.softmax(scores_BNTS, dim=-1, dtype=compute_dtype).to(q_BNTH.dtype)
    return F.dropout(weights_BNTS, dropout) @ v_BNSH, weights_BNTS


def attend_mask(T: int, S: int, lengths_B: Tensor | None, device) -> Tensor:
    """True where query t may attend to slot s: [B, 1, T, S], or [1, 1, T, S] without a cache. A row is never empty."""
    query_T = torch.arange(T, device=device)
    last_BT = query_T[None] if lengths_B is None else lengths_B[:, None] + query_T
    return (torch.arange(S, device=device) <= last_BT[..., None])[:, None]
