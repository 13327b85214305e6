"""Multi-head causal self-attention, Flax NNX.

Three ways to attend, all on packed rows (`packing.py`), so that the causal flag is the only mask: blockwise over the
tokens of this call (`blockwise.py`); over a cache, whose rows are prefixes; and step by step ("eager"), which alone
can return the weights and drop some of them in training. `jax.nn.dot_product_attention` is not used: it does not
compile for float16 on a CPU (jax 0.10 to 0.11), and its memory grows with the square of the length.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from opt_core.config import OPTConfig
from opt_flax import cache
from opt_flax.blockwise import BLOCK, blockwise_attention
from opt_flax.layers import Linear, contract

LayerCache = tuple[Array, Array]  # keys and values of one layer, [B, N, S, H] each


class Attention(nnx.Module):
    """Queries at T positions attend to the keys at and before them (Vaswani et al., arXiv:1706.03762, section 3.2)."""

    def __init__(self, config: OPTConfig, attn_implementation: str, *, rngs: nnx.Rngs, dtype):
        self.num_heads, self.head_size = config.num_attention_heads, config.head_size
        self.attn_implementation = attn_implementation
        self.dropout = nnx.Dropout(config.attention_dropout, rngs=rngs if config.attention_dropout else None)
        shape = dict(bias=config.enable_bias, init_std=config.init_std, rngs=rngs, dtype=dtype)
        self.k_proj = Linear(config.hidden_size, config.hidden_size, **shape)
        self.v_proj = Linear(config.hidden_size, config.hidden_size, **shape)
        self.q_proj = Linear(config.hidden_size, config.hidden_size, **shape)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, **shape)

    def __call__(
        self, x_BTD: Array, past: LayerCache | None, lengths_B: Array | None, output_attentions: bool
    ) -> tuple[Array, LayerCache, Array | None]:
        """Returns the output [B, T, D], the keys and values with those of this call, and the weights or None.

        `past` holds `lengths_B` filled slots a row; without it the tokens of this call are all there is.
        """
        q_BNTH = self.split_heads(self.q_proj(x_BTD) * self.head_size**-0.5)
        k_BNSH = self.split_heads(self.k_proj(x_BTD))
        v_BNSH = self.split_heads(self.v_proj(x_BTD))
        if past is not None:
            k_BNSH = cache.write(past[0], k_BNSH, lengths_B)
            v_BNSH = cache.write(past[1], v_BNSH, lengths_B)
        heads_BNTH, weights_BNTS = self.attend(q_BNTH, k_BNSH, v_BNSH, lengths_B, output_attentions)
        return self.out_proj(self.merge_heads(heads_BNTH)), (k_BNSH, v_BNSH), weights_BNTS

    def attend(self, q_BNTH, k_BNSH, v_BNSH, lengths_B, output_attentions) -> tuple[Array, Array | None]:
        dropout = self.dropout if self.dropout.rate and not self.dropout.deterministic else None
        if output_attentions or self.attn_implementation == "eager" or dropout is not None:
            heads_BNTH, weights_BNTS = eager_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B, dropout)
            return heads_BNTH, weights_BNTS if output_attentions else None
        if lengths_B is not None:
            return cached_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B), None
        return causal_attention(q_BNTH, k_BNSH, v_BNSH), None

    def split_heads(self, x_BTA: Array) -> Array:
        return x_BTA.reshape(*x_BTA.shape[:2], self.num_heads, self.head_size).swapaxes(1, 2)

    def merge_heads(self, x_BNTH: Array) -> Array:
        x_BTNH = x_BNTH.swapaxes(1, 2)
        return x_BTNH.reshape(*x_BTNH.shape[:2], self.num_heads * self.head_size)


def causal_attention(q_BNTH: Array, k_BNTH: Array, v_BNTH: Array) -> Array:
    """Attention of T tokens among themselves, O(T) memory beyond one block; the query is scaled already."""
    if q_BNTH.shape[2] <= BLOCK:
        return eager_attention(q_BNTH, k_BNTH, v_BNTH, None)[0]
    return blockwise_attention(q_BNTH, k_BNTH, v_BNTH)


def cached_attention(q_BNTH: Array, k_BNSH: Array, v_BNSH: Array, lengths_B: Array) -> Array:
    """Attention of T tokens that follow `lengths_B` cached ones, to themselves and to those."""
    return eager_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B)[0]


def eager_attention(
    q_BNTH: Array, k_BNSH: Array, v_BNSH: Array, lengths_B: Array | None, dropout: nnx.Dropout | None = None
) -> tuple[Array, Array]:
    """Attention step by step; returns the output [B, N, T, H] and the weights [B, N, T, S], before dropout."""
    scores_BNTS = contract("bnth,bnsh->bnts", q_BNTH, k_BNSH)  # scores and softmax in float32 at least
    mask_B1TS = attend_mask(q_BNTH.shape[2], k_BNSH.shape[2], lengths_B)
    scores_BNTS = jnp.where(mask_B1TS, scores_BNTS, jnp.finfo(scores_BNTS.dtype).min)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BNTH.dtype)
    kept_BNTS = weights_BNTS if dropout is None else dropout(weights_BNTS)
    return contract("bnts,bnsh->bnth", kept_BNTS, v_BNSH).astype(q_BNTH.dtype), weights_BNTS


def attend_mask(T: int, S: int, lengths_B: Array | None) -> Array:
    """True where query t may attend to slot s: [B, 1, T, S], or [1, 1, T, S] without a cache. A row is never empty."""
    query_T = jnp.arange(T)
    last_BT = query_T[None] if lengths_B is None else lengths_B[:, None] + query_T
    return (jnp.arange(S) <= last_BT[..., None])[:, None]
