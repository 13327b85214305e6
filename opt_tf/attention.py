"""Multi-head causal self-attention, TensorFlow.

Three ways to attend, all on packed rows (`packing.py`), so that the causal flag is the only mask: in blocks, or fused,
over the tokens of this call; over a cache, whose rows are prefixes; and step by step ("eager"), which alone can return
the weights. What runs on which device: docs/attention.md.
"""

from collections.abc import Mapping

import tensorflow as tf
from tensorflow import Tensor
from tensorflow.python.framework import ops
from tensorflow.python.ops import control_flow_util

from opt_core.checks import check_choice
from opt_core.config import OPTConfig
from opt_core.errors import InputError, raise_if
from opt_core.lora import MODULES
from opt_tf import cache
from opt_tf.blockwise import BLOCK, blockwise_attention
from opt_tf.cudnn import cudnn_attention, cudnn_problems
from opt_tf.layers import Linear, Module, at_least_float32, dims, drop_values, on_mesh
from opt_tf.rowwise import LONGEST, rowwise_attention

FUSED = ("flash_attention_2", "cudnn")  # cuDNN's kernel is the one that both names mean
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", *FUSED)
SLOTS = 64  # outside a graph a cache is read up to the next multiple of it

# What is dropped in the training of a layer: outputs of its halves, all of it, attention weights, inputs of adapters.
DROPPED = ("attention", "feed_forward", "layer", "weights", *MODULES)
NO_SEEDS = dict.fromkeys(DROPPED)

LayerCache = tuple[Tensor, Tensor]  # keys and values of one layer, [B, N, S, H] each


class Attention(Module):
    """Queries at T positions attend to the keys at and before them (Vaswani et al., arXiv:1706.03762, section 3.2)."""

    def __init__(self, config: OPTConfig, layer: int, attn_implementation: str, dtype=None):
        super().__init__(dtype)
        self.num_heads, self.head_size = config.heads_of(layer), config.head_size
        self.attn_implementation = attn_implementation
        self.dropout = config.attention_dropout
        width, joined = config.hidden_size, self.num_heads * self.head_size
        shape = dict(bias=config.enable_bias, init_std=config.init_std, dtype=dtype)
        self.k_proj = Linear(width, joined, **shape)
        self.v_proj = Linear(width, joined, **shape)
        self.q_proj = Linear(width, joined, **shape)
        self.out_proj = Linear(joined, width, **shape)

    def call(
        self,
        x_BTD: Tensor,
        past: LayerCache | None,
        lengths_B: Tensor | None,
        output_attentions: bool,
        first_BT: Tensor | None = None,
        head_mask_N: Tensor | None = None,
        seeds: Mapping[str, Tensor] = NO_SEEDS,
    ) -> tuple[Tensor, LayerCache, Tensor | None]:
        """Returns the output [B, T, D], the keys and values with those of this call, and the weights or None.

        `past` holds `lengths_B` filled slots a row; without it the tokens of this call are all there is, and a query
        may be kept from those before slot `first_BT`. `head_mask_N` scales the output of each head, which is the same
        as scaling its weights. In training there are `seeds` [2], of the weights to drop and by module.
        """
        q_BNTH = self.split_heads(self.q_proj(x_BTD, seeds["q_proj"]) * self.head_size**-0.5)
        k_BNSH = self.split_heads(self.k_proj(x_BTD, seeds["k_proj"]))
        v_BNSH = self.split_heads(self.v_proj(x_BTD, seeds["v_proj"]))
        if past is not None:
            k_BNSH = cache.write(past[0], k_BNSH, lengths_B)
            v_BNSH = cache.write(past[1], v_BNSH, lengths_B)
        qkv = q_BNTH, k_BNSH, v_BNSH
        heads_BNTH, weights_BNTS = self.attend(*qkv, lengths_B, output_attentions, first_BT, seeds["weights"])
        if head_mask_N is not None:
            heads_BNTH = heads_BNTH * head_mask_N[:, None, None]
        x_BTD = self.out_proj(self.merge_heads(heads_BNTH), seeds["out_proj"])
        return x_BTD, (k_BNSH, v_BNSH), weights_BNTS

    def attend(
        self, q_BNTH, k_BNSH, v_BNSH, lengths_B, output_attentions, first_BT=None, seed=None
    ) -> tuple[Tensor, Tensor | None]:
        dropout, name = 0.0 if seed is None else self.dropout, self.attn_implementation
        if output_attentions or name == "eager" or on_mesh():
            return eager_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B, dropout, first_BT, seed)
        if lengths_B is not None:
            return cached_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B, dropout, seed), None
        return causal_attention(q_BNTH, k_BNSH, v_BNSH, dropout, first_BT, name, seed), None

    def split_heads(self, x_BTA: Tensor) -> Tensor:
        B, T, _ = dims(x_BTA)
        return tf.transpose(tf.reshape(x_BTA, [B, T, self.num_heads, self.head_size]), [0, 2, 1, 3])

    def merge_heads(self, x_BNTH: Tensor) -> Tensor:
        B, N, T, H = dims(x_BNTH)
        return tf.reshape(tf.transpose(x_BNTH, [0, 2, 1, 3]), [B, T, N * H])


def causal_attention(
    q_BNTH: Tensor,
    k_BNTH: Tensor,
    v_BNTH: Tensor,
    dropout: float = 0.0,
    first_BT: Tensor | None = None,
    attn_implementation: str = "sdpa",
    seed: Tensor | None = None,
) -> Tensor:
    """Attention of T tokens among themselves, O(T) memory; the query is scaled already.

    Query t of row b sees the tokens first_BT[b, t] to t, all up to t without it: documents in a row, each without gaps.

    Raises:
        InputError: where the implementation has no kernel for the dtype, the device, documents or dropout.
    """
    if attn_implementation in FUSED:
        _check_call(attn_implementation, q_BNTH, dropout, first_BT)
        return cudnn_attention(q_BNTH, k_BNTH, v_BNTH)
    T = q_BNTH.shape[2]
    if dropout or (T is not None and T <= BLOCK):  # one block; and dropout is not worth a second gradient
        return eager_attention(q_BNTH, k_BNTH, v_BNTH, None, dropout, first_BT, seed)[0]
    if first_BT is None and T is not None and T <= LONGEST and not _traced_for_xla():
        return rowwise_attention(q_BNTH, k_BNTH, v_BNTH)
    return blockwise_attention(q_BNTH, k_BNTH, v_BNTH, first_BT)


def cached_attention(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    lengths_B: Tensor,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention of T tokens that follow `lengths_B` cached ones, to themselves and to those."""
    if tf.executing_eagerly():
        S = -(-(int(tf.reduce_max(lengths_B)) + q_BNTH.shape[2]) // SLOTS) * SLOTS
        k_BNSH, v_BNSH = k_BNSH[:, :, :S], v_BNSH[:, :, :S]
    return eager_attention(q_BNTH, k_BNSH, v_BNSH, lengths_B, dropout, seed=seed)[0]


def eager_attention(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    lengths_B: Tensor | None,
    dropout: float = 0.0,
    first_BT: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention step by step; returns the output [B, N, T, H] and the weights [B, N, T, S], before dropout."""
    # Scores, softmax and the sums over values in float32 at least: a half-precision product has half-precision output.
    q, k, v = (at_least_float32(x) for x in (q_BNTH, k_BNSH, v_BNSH))
    scores_BNTS = tf.matmul(q, k, transpose_b=True)
    mask_B1TS = attend_mask(dims(q)[2], dims(k)[2], lengths_B, first_BT)
    scores_BNTS = tf.where(mask_B1TS, scores_BNTS, scores_BNTS.dtype.min)
    weights_BNTS = tf.nn.softmax(scores_BNTS, axis=-1)
    heads_BNTH = tf.matmul(drop_values(weights_BNTS, dropout, seed), v)
    return tf.cast(heads_BNTH, q_BNTH.dtype), tf.cast(weights_BNTS, q_BNTH.dtype)


def attend_mask(T: int | Tensor, S: int | Tensor, lengths_B: Tensor | None, first_BT: Tensor | None = None) -> Tensor:
    """True where query t may attend to slot s: [B, 1, T, S], or [1, 1, T, S] for all rows. A row is never empty."""
    query_T, slot_S = tf.range(T, dtype=tf.int64), tf.range(S, dtype=tf.int64)
    last_BT = query_T[None] if lengths_B is None else lengths_B[:, None] + query_T
    mask_BTS = slot_S <= last_BT[..., None]
    if first_BT is not None:
        mask_BTS &= slot_S >= tf.cast(first_BT, tf.int64)[..., None]
    return tf.expand_dims(mask_BTS, 1)  # an index would end the process on a mesh (DTensor of TensorFlow 2.21)


def check_implementation(attn_implementation: str, config: OPTConfig, dtype: str) -> None:
    """Raises an InputError for a name that is unknown, or that cannot run here in this compute dtype."""
    check_choice("attn_implementation", attn_implementation, ATTENTION_IMPLEMENTATIONS)
    if attn_implementation in FUSED:
        _raise(attn_implementation, cudnn_problems(dtype, config.head_size))


def _check_call(attn_implementation: str, q_BNTH: Tensor, dropout: float, first_BT: Tensor | None) -> None:
    problems = cudnn_problems(q_BNTH.dtype.name, q_BNTH.shape[3])
    if dropout:
        problems.append(f"expects no dropout of attention weights, got {dropout}")
    if first_BT is not None:
        problems.append("expects one document a row, got several (first_BT)")
    _raise(attn_implementation, problems)


def _raise(attn_implementation: str, problems: list[str]) -> None:
    lines = (f"attn_implementation: {attn_implementation} {problem}" for problem in problems)
    raise_if(InputError, "invalid arguments", lines)


def _traced_for_xla() -> bool:
    """Inside a function with jit_compile; TensorFlow 2.21 has no public way to ask. Taken wrongly, it costs memory."""
    return control_flow_util.GraphOrParentsInXlaContext(ops.get_default_graph())
