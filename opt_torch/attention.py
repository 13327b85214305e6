"""Multi-head causal self-attention, PyTorch.

Three ways to attend, all on packed rows (`packing.py`), so that the causal flag is the only mask: fused over the tokens
of this call; over a cache, whose rows are prefixes; and step by step ("eager"), which alone can return the weights.
What runs on which device: docs/attention.md.
"""

import functools
import importlib.util

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opt_core.checks import check_choice
from opt_core.config import OPTConfig
from opt_core.errors import InputError, raise_if
from opt_torch import cache, flash
from opt_torch.flex import BlockMask, flexible_attention
from opt_torch.layers import Linear
from opt_torch.sdpa import HALF, check_order, fused_attention, needs_gradient, without_autocast
from opt_torch.segments import Segments, attention_by_segment, make_segments, one_by_one

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", *flash.PACKAGES, "flex_attention")
LayerCache = tuple[Tensor, Tensor]  # keys and values of one layer, [B, N, S, H] each
FEW_TOKENS = 8  # a step of so many reads the cache once for each: still less than a mask of all slots costs


class Attention(nn.Module):
    """Queries at T positions attend to the keys at and before them (Vaswani et al., arXiv:1706.03762, section 3.2)."""

    def __init__(self, config: OPTConfig, layer: int, attn_implementation: str):
        super().__init__()
        self.num_heads, self.head_size = config.heads_of(layer), config.head_size
        self.attn_implementation = attn_implementation
        self.dropout = config.attention_dropout
        width, joined = config.hidden_size, self.num_heads * self.head_size
        shape = dict(bias=config.enable_bias, init_std=config.init_std)
        self.k_proj = Linear(width, joined, **shape)
        self.v_proj = Linear(width, joined, **shape)
        self.q_proj = Linear(width, joined, **shape)
        self.out_proj = Linear(joined, width, **shape)

    def forward(
        self,
        x_BTD: Tensor,
        past: LayerCache | None,
        slots: cache.Slots | None,
        output_attentions: bool,
        first_BT: Tensor | None = None,
        segments: Segments | BlockMask | None = None,
        head_mask_N: Tensor | None = None,
    ) -> tuple[Tensor, LayerCache, Tensor | None]:
        """Returns the output [B, T, D], the keys and values with those of this call, and the weights or None.

        `past` has room for them in `slots`; without it the tokens of this call are all there is, and a query
        may be kept from those before slot `first_BT`. `segments` are what follows from that and from padding.
        `head_mask_N` scales the output of each head, which is the same as scaling its weights.
        """
        q_BNTH = self.split_heads(self.q_proj(x_BTD) * self.head_size**-0.5)
        k_BNSH = self.split_heads(self.k_proj(x_BTD))
        v_BNSH = self.split_heads(self.v_proj(x_BTD))
        if past is not None:
            k_BNSH = cache.write(past[0], k_BNSH, slots)
            v_BNSH = cache.write(past[1], v_BNSH, slots)
        same = q_BNTH.dtype  # a cache may have another dtype; `to` copies nothing where it has not
        qkv = q_BNTH, k_BNSH.to(same), v_BNSH.to(same)
        heads_BNTH, weights_BNTS = self.attend(*qkv, slots, output_attentions, first_BT, segments)
        if head_mask_N is not None:
            heads_BNTH = heads_BNTH * head_mask_N[:, None, None].to(heads_BNTH.dtype)
        return self.out_proj(self.merge_heads(heads_BNTH)), (k_BNSH, v_BNSH), weights_BNTS

    def attend(
        self, q_BNTH, k_BNSH, v_BNSH, slots, output_attentions, first_BT=None, segments=None
    ) -> tuple[Tensor, Tensor | None]:
        dropout, name = self.dropout if self.training else 0.0, self.attn_implementation
        if output_attentions or name == "eager":
            lengths_B = None if slots is None else slots.lengths_B
            return eager_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B, dropout, first_BT)
        if slots is not None:
            return cached_attention(q_BNTH, k_BNSH, v_BNSH, slots, dropout, name), None
        return causal_attention(q_BNTH, k_BNSH, v_BNSH, dropout, first_BT, name, segments), None

    def split_heads(self, x_BTA: Tensor) -> Tensor:
        return x_BTA.view(*x_BTA.shape[:2], self.num_heads, self.head_size).transpose(1, 2)

    def merge_heads(self, x_BNTH: Tensor) -> Tensor:
        return x_BNTH.transpose(1, 2).flatten(2)


def causal_attention(
    q_BNTH: Tensor,
    k_BNTH: Tensor,
    v_BNTH: Tensor,
    dropout: float = 0.0,
    first_BT: Tensor | None = None,
    attn_implementation: str = "sdpa",
    segments: Segments | BlockMask | None = None,
) -> Tensor:
    """Fused attention of T tokens among themselves, O(T) memory; the query is scaled already.

    Query t of row b sees the tokens first_BT[b, t] to t, all up to t without it: documents in a row, each without gaps.
    `segments` say the same to kernels of variable length, and which tokens are padding, or in blocks to FlexAttention;
    made here if needed and absent.

    Raises:
        InputError: where the implementation has no kernel for the dtype, the device, a gradient or dropout.
    """
    if first_BT is not None and segments is None and attn_implementation in flash.PACKAGES:
        segments = make_segments(*q_BNTH.shape[::2], first_BT, None, q_BNTH.device)
    if attn_implementation in flash.PACKAGES:
        return flash.flash_attention(q_BNTH, k_BNTH, v_BNTH, attn_implementation, segments, dropout)
    if attn_implementation == "flex_attention":
        mask = segments if isinstance(segments, BlockMask) else None
        return flexible_attention(q_BNTH, k_BNTH, v_BNTH, first_BT, dropout, mask)
    if q_BNTH.device.type == "cpu" and q_BNTH.dtype in HALF and needs_gradient(q_BNTH, k_BNTH, v_BNTH):
        # Its backward rounds partial sums to half precision: errors of 1.6 bounds, and growing with T (torch 2.13).
        qkv = (x.float() for x in (q_BNTH, k_BNTH, v_BNTH))
        with without_autocast(q_BNTH.device):
            return causal_attention(*qkv, dropout, first_BT, segments=segments).to(q_BNTH.dtype)
    if first_BT is None:
        return fused_attention(q_BNTH, k_BNTH, v_BNTH, dropout=dropout)
    return _attention_in_documents(q_BNTH, k_BNTH, v_BNTH, dropout, first_BT, segments)


def _attention_in_documents(q_BNTH, k_BNTH, v_BNTH, dropout: float, first_BT: Tensor, segments) -> Tensor:
    """By documents where there is a way to: a mask lets a kernel compute all T x T scores, and reads them as well."""
    B, _, T, _ = q_BNTH.shape
    kernel = None
    if torch.compiler.is_compiling():
        pass  # sizes of a graph may not depend on where documents begin
    elif q_BNTH.device.type == "cpu":
        kernel = functools.partial(one_by_one, dropout)  # 3.5 times as fast as a mask for 4 documents, 11 for 32
    elif not dropout and flash.may_run_inside_pytorch(q_BNTH):
        kernel = flash.runs_inside_pytorch()
    if kernel is None:
        mask_B1TT = attend_mask(T, T, None, q_BNTH.device, first_BT)
        return fused_attention(q_BNTH, k_BNTH, v_BNTH, mask=mask_B1TT, dropout=dropout)
    segments = make_segments(B, T, first_BT, None, q_BNTH.device) if segments is None else segments
    return attention_by_segment(kernel, q_BNTH, k_BNTH, v_BNTH, segments)


def cached_attention(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    slots: cache.Slots,
    dropout: float = 0.0,
    attn_implementation: str = "sdpa",
) -> Tensor:
    """Attention of the T tokens in `slots` of a cache, to themselves and to those before them."""
    T = q_BNTH.shape[2]
    plain = not dropout and not needs_gradient(q_BNTH, k_BNSH, v_BNSH)
    if attn_implementation in flash.PACKAGES:
        flash.check_call(attn_implementation, q_BNTH, False, dropout)
        if plain and flash.package(attn_implementation) is not None:
            return flash.flash_cached_attention(q_BNTH, k_BNSH, v_BNSH, slots.lengths_B, attn_implementation)
    if plain and T <= FEW_TOKENS and q_BNTH.is_cuda and q_BNTH.dtype != torch.float64 and _has_triton():
        from opt_torch.triton_decode import decode_attention

        with torch.cuda.device(q_BNTH.device):  # Triton launches on the current one
            return decode_attention(q_BNTH, k_BNSH, v_BNSH, slots.lengths_B)
    k_BNSH, v_BNSH = k_BNSH[:, :, : slots.seen], v_BNSH[:, :, : slots.seen]
    if slots.sees_all:
        return fused_attention(q_BNTH, k_BNSH, v_BNSH, dropout=dropout, causal=False)
    if q_BNTH.device.type == "cpu" and q_BNTH.dtype in HALF:
        # SDPA with a mask is 5 times slower than the plain products for bfloat16 on a CPU (torch 2.13).
        return eager_attention(q_BNTH, k_BNSH, v_BNSH, slots.lengths_B, dropout)[0]
    mask_B1TS = attend_mask(T, k_BNSH.shape[2], slots.lengths_B, q_BNTH.device)
    return fused_attention(q_BNTH, k_BNSH, v_BNSH, mask=mask_B1TS, dropout=dropout)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def eager_attention(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    lengths_B: Tensor | None,
    dropout: float = 0.0,
    first_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention step by step; returns the output [B, N, T, H] and the weights [B, N, T, S], before dropout."""
    compute_dtype = torch.promote_types(q_BNTH.dtype, torch.float32)  # scores and softmax in float32 at least
    with without_autocast(q_BNTH.device):
        scores_BNTS = q_BNTH.to(compute_dtype) @ k_BNSH.to(compute_dtype).transpose(-1, -2)
    mask_B1TS = attend_mask(q_BNTH.shape[2], k_BNSH.shape[2], lengths_B, q_BNTH.device, first_BT)
    scores_BNTS = scores_BNTS.masked_fill(~mask_B1TS, torch.finfo(scores_BNTS.dtype).min)
    weights_BNTS = torch.softmax(scores_BNTS, dim=-1, dtype=compute_dtype).to(q_BNTH.dtype)
    return F.dropout(weights_BNTS, dropout) @ v_BNSH, weights_BNTS


def attend_mask(T: int, S: int, lengths_B: Tensor | None, device, first_BT: Tensor | None = None) -> Tensor:
    """True where query t may attend to slot s: [B, 1, T, S], or [1, 1, T, S] for all rows. A row is never empty."""
    query_T, slot_S = torch.arange(T, device=device), torch.arange(S, device=device)
    last_BT = query_T[None] if lengths_B is None else lengths_B[:, None] + query_T
    mask_BTS = slot_S <= last_BT[..., None]
    return (mask_BTS if first_BT is None else mask_BTS & (slot_S >= first_BT[..., None]))[:, None]


def check_implementation(attn_implementation: str, config: OPTConfig) -> None:
    """Raises an InputError for a name that is unknown, or that cannot run here whatever the input will be."""
    check_choice("attn_implementation", attn_implementation, ATTENTION_IMPLEMENTATIONS)
    check_order()
    if attn_implementation in flash.PACKAGES:
        raise_if(InputError, "invalid arguments", flash.installation_problems(attn_implementation, config.head_size))
