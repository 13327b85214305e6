"""Multi-head causal self-attention, Flax NNX.

Ways to attend, all on packed rows (`packing.py`), so that no kernel is given a mask: fused kernels on NVIDIA GPUs
(`cudnn.py`, `pallas_attention.py`); blockwise over the tokens of this call elsewhere (`blockwise.py`); over a cache,
whose rows are prefixes; and step by step ("eager"), which alone can return the weights and drop some of them in
training. What runs on which device: docs/attention.md. `jax.nn.dot_product_attention` serves cuDNN alone: its other
implementation does not compile for float16 on a CPU (jax 0.10 to 0.11), and takes memory by the square of the length.
"""

import functools
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from opt_core.checks import check_choice
from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_flax import cache
from opt_flax.blockwise import blockwise_attention
from opt_flax.cudnn import HALF, compile_problems, cudnn_attention, cudnn_decode, cudnn_problems
from opt_flax.layers import Dropout, Linear, contract
from opt_flax.pallas_attention import gpu_problems, pallas_attention, pallas_problems
from opt_flax.sharding import Placement, by_heads

# Kernels that a name may mean, the best first. On a CPU and a TPU, "sdpa" is the only one of these that runs.
KERNELS = {
    "sdpa": ("cudnn", "pallas"),
    "flash_attention_2": ("cudnn", "pallas"),
    "cudnn": ("cudnn",),
    "pallas": ("pallas",),
}
ATTENTION_IMPLEMENTATIONS = ("eager", *KERNELS)
LayerCache = tuple[Array, Array]  # keys and values of one layer, [B, N, S, H] each


class Attention(nnx.Module):
    """Queries at T positions attend to the keys at and before them (Vaswani et al., arXiv:1706.03762, section 3.2)."""

    def __init__(self, config: OPTConfig, layer: int, attn_implementation: str, *, rngs: nnx.Rngs, dtype):
        self.num_heads, self.head_size = config.heads_of(layer), config.head_size
        self.attn_implementation = attn_implementation
        self.placement: Placement | None = None
        self.dropout = Dropout(config.attention_dropout, rngs=rngs if config.attention_dropout else None)
        shape = dict(bias=config.enable_bias, init_std=config.init_std, rngs=rngs, dtype=dtype)
        width, joined = config.hidden_size, self.num_heads * self.head_size
        self.k_proj = Linear(width, joined, **shape)
        self.v_proj = Linear(width, joined, **shape)
        self.q_proj = Linear(width, joined, **shape)
        self.out_proj = Linear(joined, width, **shape)

    def __call__(
        self,
        x_BTD: Array,
        past: LayerCache | None,
        lengths_B: Array | None,
        output_attentions: bool,
        first_BT: Array | None = None,
        head_mask_N: Array | None = None,
    ) -> tuple[Array, LayerCache, Array | None]:
        """Returns the output [B, T, D], the keys and values with those of this call, and the weights or None.

        `past` holds `lengths_B` filled slots a row; without it the tokens of this call are all there is, and a query
        may be kept from those before slot `first_BT`. `head_mask_N` scales the output of each head, which is the same
        as scaling its weights.
        """
        q_BNTH = self.split_heads(self.q_proj(x_BTD) * self.head_size**-0.5)
        k_BNSH = self.split_heads(self.k_proj(x_BTD))
        v_BNSH = self.split_heads(self.v_proj(x_BTD))
        if past is not None:
            k_BNSH = by_heads(self.placement, cache.write, past[0], k_BNSH, lengths_B)
            v_BNSH = by_heads(self.placement, cache.write, past[1], v_BNSH, lengths_B)
        heads_BNTH, weights_BNTS = self.attend(q_BNTH, k_BNSH, v_BNSH, lengths_B, output_attentions, first_BT)
        if head_mask_N is not None:
            heads_BNTH = heads_BNTH * head_mask_N[:, None, None].astype(heads_BNTH.dtype)
        return self.out_proj(self.merge_heads(heads_BNTH)), (k_BNSH, v_BNSH), weights_BNTS

    def attend(self, q_BNTH, k_BNSH, v_BNSH, lengths_B, output_attentions, first_BT=None) -> tuple[Array, Array | None]:
        dropout = self.dropout if self.dropout.rate and not self.dropout.deterministic else None
        name = self.attn_implementation
        if dropout is not None and name not in ("eager", "sdpa"):
            problem = f"attn_implementation: {name} expects attention_dropout 0 in training, got {dropout.rate}"
            raise InputError("invalid arguments", [problem])
        if output_attentions or name == "eager" or dropout is not None:
            heads_BNTH, weights_BNTS = eager_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B, dropout, first_BT)
            return heads_BNTH, weights_BNTS if output_attentions else None
        if lengths_B is not None:
            attend, given = cached_attention, (q_BNTH, k_BNSH, v_BNSH, lengths_B)
        else:
            attend, given = causal_attention, (q_BNTH, k_BNSH, v_BNSH, first_BT)
        return by_heads(self.placement, functools.partial(attend, attn_implementation=name), *given), None

    def split_heads(self, x_BTA: Array) -> Array:
        return x_BTA.reshape(*x_BTA.shape[:2], self.num_heads, self.head_size).swapaxes(1, 2)

    def merge_heads(self, x_BNTH: Array) -> Array:
        x_BTNH = x_BNTH.swapaxes(1, 2)
        return x_BTNH.reshape(*x_BTNH.shape[:2], self.num_heads * self.head_size)


def causal_attention(
    q_BNTH: Array,
    k_BNTH: Array,
    v_BNTH: Array,
    first_BT: Array | None = None,
    attn_implementation: str = "sdpa",
) -> Array:
    """Attention of T tokens among themselves, O(T) memory; the query is scaled already.

    Query t of row b sees the tokens first_BT[b, t] to t, all up to t without it: documents in a row, each without gaps.

    Raises:
        InputError: where the implementation has no kernel for the dtype, the head size, the device, or documents.
    """
    kernel = fused_kernel(attn_implementation, q_BNTH.dtype, q_BNTH.shape[3], documents=first_BT is not None)
    fused = functools.partial(pallas_attention, first_BT=first_BT) if kernel == "pallas" else cudnn_attention
    if attn_implementation != "sdpa":
        return fused(q_BNTH, k_BNTH, v_BNTH)
    unfused = functools.partial(blockwise_attention, first_BT=first_BT)
    return _by_platform(fused if kernel else None, unfused, q_BNTH, k_BNTH, v_BNTH)


def cached_attention(
    q_BNTH: Array, k_BNSH: Array, v_BNSH: Array, lengths_B: Array, attn_implementation: str = "sdpa"
) -> Array:
    """Attention of T tokens that follow `lengths_B` cached ones, to themselves and to those."""
    kernel = fused_kernel(attn_implementation, q_BNTH.dtype, q_BNTH.shape[3], cached_tokens=q_BNTH.shape[2])

    def fused(q_BNTH: Array, *kv_BNSH: Array) -> Array:
        kv_BNSH = (x_BNSH.astype(q_BNTH.dtype) for x_BNSH in kv_BNSH)  # a cache may have another dtype
        return (pallas_attention if kernel == "pallas" else cudnn_decode)(q_BNTH, *kv_BNSH, lengths_B)

    if attn_implementation != "sdpa":
        return fused(q_BNTH, k_BNSH, v_BNSH)
    unfused = functools.partial(_eager, lengths_B=lengths_B)
    return _by_platform(fused if kernel else None, unfused, q_BNTH, k_BNSH, v_BNSH)


def _by_platform(fused, unfused, *qkv_BNSH: Array) -> Array:
    """`fused` where there is one and the arrays lie on an NVIDIA GPU: beside a GPU, a model may still be on the CPU."""
    return unfused(*qkv_BNSH) if fused is None else lax.platform_dependent(*qkv_BNSH, cuda=fused, default=unfused)


def eager_attention(
    q_BNTH: Array,
    k_BNSH: Array,
    v_BNSH: Array,
    lengths_B: Array | None,
    dropout: Dropout | None = None,
    first_BT: Array | None = None,
) -> tuple[Array, Array]:
    """Attention step by step; returns the output [B, N, T, H] and the weights [B, N, T, S], before dropout."""
    scores_BNTS = contract("bnth,bnsh->bnts", q_BNTH, k_BNSH)  # scores and softmax in float32 at least
    mask_B1TS = attend_mask(q_BNTH.shape[2], k_BNSH.shape[2], lengths_B, first_BT)
    scores_BNTS = jnp.where(mask_B1TS, scores_BNTS, jnp.finfo(scores_BNTS.dtype).min)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BNTH.dtype)
    kept_BNTS = weights_BNTS if dropout is None else dropout(weights_BNTS)
    return contract("bnts,bnsh->bnth", kept_BNTS, v_BNSH).astype(q_BNTH.dtype), weights_BNTS


def _eager(
    q_BNTH: Array, k_BNSH: Array, v_BNSH: Array, lengths_B: Array | None, first_BT: Array | None = None
) -> Array:
    return eager_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B, None, first_BT)[0]


def attend_mask(T: int, S: int, lengths_B: Array | None, first_BT: Array | None = None) -> Array:
    """True where query t may attend to slot s: [B, 1, T, S], or [1, 1, T, S] for all rows. A row is never empty."""
    query_T, slot_S = jnp.arange(T), jnp.arange(S)
    last_BT = query_T[None] if lengths_B is None else lengths_B[:, None] + query_T
    mask_BTS = slot_S <= last_BT[..., None]
    return (mask_BTS if first_BT is None else mask_BTS & (slot_S >= first_BT[..., None]))[:, None]


def check_implementation(attn_implementation: str, config: OPTConfig, dtype=jnp.bfloat16) -> None:
    """Raises an InputError for a name that is unknown, or that cannot run here whatever the input will be."""
    check_choice("attn_implementation", attn_implementation, ATTENTION_IMPLEMENTATIONS)
    if attn_implementation != "eager":
        fused_kernel(attn_implementation, dtype, config.head_size)


def fused_kernel(
    attn_implementation: str, dtype, head_size: int, *, documents: bool = False, cached_tokens: int = 0
) -> str | None:
    """The kernel that a name means here, "cudnn" or "pallas"; None for "sdpa" where there is none.

    Of the two, only Pallas serves documents in a row and several queries over a cache; and it reads a cache as it lies.
    cuDNN's has to compile here, which is tried once a process, and Pallas to know the GPU.

    Raises:
        InputError: where there is none for another name.
    """
    kernels, capability = KERNELS[attn_implementation], compute_capability()
    problems = _device_problems(capability)
    if attn_implementation == "flash_attention_2" and dtype not in HALF:
        problems.append(f"expects float16 or bfloat16, got {jnp.dtype(dtype).name}")
    able = not problems
    for kernel in kernels[-1:] if documents or cached_tokens else kernels:
        if kernel == "cudnn":
            more, try_here = cudnn_problems(dtype, head_size, capability, documents, cached_tokens), compile_problems
        else:
            more, try_here = pallas_problems(dtype, head_size), gpu_problems
        if able and not more:
            more = try_here()
        if able and not more:
            return kernel
        problems += more
    if attn_implementation != "sdpa":
        lines = (f"attn_implementation: {attn_implementation} {problem}" for problem in dict.fromkeys(problems))
        raise InputError("invalid arguments", lines)
    return None


def compute_capability() -> tuple[int, int] | None:
    """That of the first device of JAX's default backend, (9, 0) for an H100; None where it is no NVIDIA GPU."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.local_devices()[0], "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else None


def _device_problems(capability: tuple[int, int] | None) -> list[str]:
    if capability is not None and capability >= (8, 0):
        return []
    got = jax.default_backend() if capability is None else f"{capability[0]}.{capability[1]}"
    return [f"expects an NVIDIA GPU of compute capability 8.0 or newer, got {got}"]
