"""Multi-head causal self-attention, TensorFlow.

Three ways to attend, all on packed rows (`packing.py`), so that the causal flag is the only mask: blockwise over
the tokens of this call; over a cache, whose rows are prefixes; and step by step ("eager"), which alone can return the
weights.
"""

import tensorflow as tf
from tensorflow import Tensor

from opt_core.config import OPTConfig
from opt_tf import cache
from opt_tf.blockwise import BLOCK, blockwise_attention
from opt_tf.layers import Linear, Module, at_least_float32, dims, drop_values

LayerCache = tuple[Tensor, Tensor]  # keys and values of one layer, [B, N, S, H] each


class Attention(Module):
    """Queries at T positions attend to the keys at and before them (Vaswani et al., arXiv:1706.03762, section 3.2)."""

    def __init__(self, config: OPTConfig, attn_implementation: str, dtype=None):
        super().__init__(dtype)
        self.num_heads, self.head_size = config.num_attention_heads, config.head_size
        self.attn_implementation = attn_implementation
        self.dropout = config.attention_dropout
        shape = dict(bias=config.enable_bias, init_std=config.init_std, dtype=dtype)
        self.k_proj = Linear(config.hidden_size, config.hidden_size, **shape)
        self.v_proj = Linear(config.hidden_size, config.hidden_size, **shape)
        self.q_proj = Linear(config.hidden_size, config.hidden_size, **shape)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, **shape)

    def call(
        self,
        x_BTD: Tensor,
        past: LayerCache | None,
        lengths_B: Tensor | None,
        output_attentions: bool,
        training: bool = False,
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
        heads_BNTH, weights_BNTS = self.attend(q_BNTH, k_BNSH, v_BNSH, lengths_B, output_attentions, training)
        return self.out_proj(self.merge_heads(heads_BNTH)), (k_BNSH, v_BNSH), weights_BNTS

    def attend(
        self, q_BNTH, k_BNSH, v_BNSH, lengths_B, output_attentions, training=False
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if training else 0.0
        if output_attentions or self.attn_implementation == "eager":
            return eager_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B, dropout)
        if lengths_B is not None:
            return cached_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B, dropout), None
        return causal_attention(q_BNTH, k_BNSH, v_BNSH, dropout), None

    def split_heads(self, x_BTA: Tensor) -> Tensor:
        B, T, _ = dims(x_BTA)
        return tf.transpose(tf.reshape(x_BTA, [B, T, self.num_heads, self.head_size]), [0, 2, 1, 3])

    def merge_heads(self, x_BNTH: Tensor) -> Tensor:
        B, N, T, H = dims(x_BNTH)
        return tf.reshape(tf.transpose(x_BNTH, [0, 2, 1, 3]), [B, T, N * H])


def causal_attention(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, dropout: float = 0.0) -> Tensor:
    """Attention of T tokens among themselves, O(T) memory; the query is scaled already."""
    T = q_BNTH.shape[2]
    if dropout or (T is not None and T <= BLOCK):  # one block; and dropout is not worth a second gradient
        return eager_attention(q_BNTH, k_BNTH, v_BNTH, None, dropout)[0]
    return blockwise_attention(q_BNTH, k_BNTH, v_BNTH)


def cached_attention(q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, lengths_B: Tensor, dropout: float = 0.0) -> Tensor:
    """Attention of T tokens that follow `lengths_B` cached ones, to themselves and to those."""
    return eager_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B, dropout)[0]


def eager_attention(
    q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, lengths_B: Tensor | None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention step by step; returns the output [B, N, T, H] and the weights [B, N, T, S], before dropout."""
    # Scores, softmax and the sums over values in float32 at least: a half-precision product has half-precision output.
    q, k, v = (at_least_float32(x) for x in (q_BNTH, k_BNSH, v_BNSH))
    scores_BNTS = tf.matmul(q, k, transpose_b=True)
    mask_B1TS = attend_mask(dims(q)[2], dims(k)[2], lengths_B)
    scores_BNTS = tf.where(mask_B1TS, scores_BNTS, scores_BNTS.dtype.min)
    weights_BNTS = tf.nn.softmax(scores_BNTS, axis=-1)
    heads_BNTH = tf.matmul(drop_values(weights_BNTS, dropout), v)
    return tf.cast(heads_BNTH, q_BNTH.dtype), tf.cast(weights_BNTS, q_BNTH.dtype)


def attend_mask(T: int | Tensor, S: int | Tensor, lengths_B: Tensor | None) -> Tensor:
    """True where query t may attend to slot s: [B, 1, T, S], or [1, 1, T, S] without a cache. A row is never empty."""
    query_T = tf.range(T, dtype=tf.int64)
    last_BT = query_T[None] if lengths_B is None else lengths_B[:, None] + query_T
    return (tf.range(S, dtype=tf.int64) <= last_BT[..., None])[:, None]
