"""FlexAttention in PyTorch ("flex_attention"): one Triton kernel, or one C++ loop on a CPU, compiled from the mask.

Any floating dtype, and documents without a kernel of variable length. The first call of each shape compiles for seconds
(on a CPU about 20). On a CPU it has no gradient, and dropout it has nowhere (PyTorch 2.13).
"""

import contextlib
import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from opt_core.errors import InputError, raise_if
from opt_torch.sdpa import needs_gradient

SHAPES = 4096  # that are compiled in one process; the next one is an error of PyTorch's


def flexible_attention(
    q_BNTH: Tensor,
    k_BNTH: Tensor,
    v_BNTH: Tensor,
    first_BT: Tensor | None = None,
    dropout: float = 0.0,
    mask: BlockMask | None = None,
) -> Tensor:
    """Causal attention of T tokens among themselves, from slot `first_BT` on; the query is scaled already.

    `mask` says the same, made once for all layers; without it, it is made here.
    """
    _check_call(q_BNTH, k_BNTH, v_BNTH, dropout)
    mask = make_mask(*q_BNTH.shape[::2], first_BT, q_BNTH.device) if mask is None else mask
    # Beyond 8 shapes, its limit, PyTorch would stop compiling, and compute all T x T scores without a word.
    more = contextlib.nullcontext()
    if not torch.compiler.is_compiling():
        more = torch._dynamo.config.patch(recompile_limit=SHAPES, accumulated_recompile_limit=SHAPES)
    with more:
        return _compiled()(q_BNTH, k_BNTH, v_BNTH, block_mask=mask, scale=1.0)


def make_mask(B: int, T: int, first_BT: Tensor | None, device) -> BlockMask:
    """Which blocks of scores hold something visible; found from all T x T of each row."""
    return create_block_mask(_visible(first_BT), None if first_BT is None else B, None, T, T, device=device)


def _visible(first_BT: Tensor | None):
    def causal(b, n, t, s):
        return s <= t

    def within_document(b, n, t, s):
        return (s <= t) & (s >= first_BT[b, t])

    return causal if first_BT is None else within_document


def _check_call(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, dropout: float) -> None:
    problems = []
    if q_BNTH.device.type == "cpu" and needs_gradient(q_BNTH, k_BNTH, v_BNTH):
        problems.append("attn_implementation: flex_attention expects no gradient on a CPU, got inputs that require one")
    if dropout:
        problems.append(f"attn_implementation: flex_attention expects attention_dropout 0 in training, got {dropout}")
    raise_if(InputError, "invalid arguments", problems)


@functools.cache
def _compiled():
    # Each shape by itself: with dynamic shapes masks that depend on the row gave NaN (pytorch issue 186775).
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
