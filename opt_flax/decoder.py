"""The decoder, Flax NNX: embeddings, layers, final norm, projections (Zhang et al., arXiv:2205.01068, section 2)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from opt_core.config import POSITION_OFFSET, OPTConfig
from opt_core.outputs import BaseModelOutput
from opt_flax.attention import Attention, LayerCache
from opt_flax.cache import Cache, GrowingCache, grow
from opt_flax.layers import ACTIVATION_FUNCTIONS, Dropout, Embedding, LayerNorm, Linear
from opt_flax.packing import Packing, first_columns, make_packing, pack, unpack, unpack_attentions
from opt_flax.sharding import Placement, on_rows, pin_weights


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each with a residual; norms before them, or after them (350m)."""

    def __init__(self, config: OPTConfig, layer: int, attn_implementation: str, *, rngs: nnx.Rngs, dtype):
        self.pre_norm = config.do_layer_norm_before
        self.dropout = Dropout(config.dropout, rngs=rngs if config.dropout else None)
        activation = config.activation_function
        self.activation = activation if callable(activation) else ACTIVATION_FUNCTIONS[activation]
        affine = config.layer_norm_elementwise_affine
        shape = dict(bias=config.enable_bias, init_std=config.init_std, rngs=rngs, dtype=dtype)
        self.self_attn = Attention(config, layer, attn_implementation, rngs=rngs, dtype=dtype)
        self.self_attn_layer_norm = LayerNorm(config.hidden_size, affine=affine, dtype=dtype)
        self.fc1 = Linear(config.hidden_size, config.ffn_dim, **shape)
        self.fc2 = Linear(config.ffn_dim, config.hidden_size, **shape)
        self.final_layer_norm = LayerNorm(config.hidden_size, affine=affine, dtype=dtype)

    def __call__(
        self,
        x_BTD: Array,
        past: LayerCache | None,
        lengths_B: Array | None,
        output_attentions: bool,
        first_BT: Array | None = None,
        head_mask_N: Array | None = None,
    ) -> tuple[Array, LayerCache, Array | None]:
        residual_BTD = x_BTD
        if self.pre_norm:
            x_BTD = self.self_attn_layer_norm(x_BTD)
        given = past, lengths_B, output_attentions, first_BT, head_mask_N
        x_BTD, present, weights_BNTS = self.self_attn(x_BTD, *given)
        x_BTD = residual_BTD + self.dropout(x_BTD)
        if not self.pre_norm:
            x_BTD = self.self_attn_layer_norm(x_BTD)

        residual_BTD = x_BTD
        if self.pre_norm:
            x_BTD = self.final_layer_norm(x_BTD)
        x_BTD = self.fc2(self.activation(self.fc1(x_BTD)))
        x_BTD = residual_BTD + self.dropout(x_BTD)
        if not self.pre_norm:
            x_BTD = self.final_layer_norm(x_BTD)
        return on_rows(self.self_attn.placement, x_BTD), present, weights_BNTS


class Decoder(nnx.Module):
    """Tokens [B, T] to hidden states [B, T, E]. Arguments are checked before they come here.

    Parameters have the `dtype`, values between the layers the `compute_dtype`.
    """

    def __init__(self, config: OPTConfig, attn_implementation: str, *, rngs: nnx.Rngs, dtype, compute_dtype):
        self.static_config = StaticConfig(config)
        self.placement: Placement | None = None
        self.compute_dtype = compute_dtype
        embed_size, hidden_size = config.word_embed_proj_dim, config.hidden_size
        start = dict(init_std=config.init_std, rngs=rngs, dtype=dtype)
        self.embed_tokens = Embedding(config.vocab_size, embed_size, zero_row=config.pad_token_id, **start)
        self.embed_positions = Embedding(config.max_position_embeddings + POSITION_OFFSET, hidden_size, **start)
        projects, norms = config.has_projections, config.has_final_layer_norm
        self.project_in = Linear(embed_size, hidden_size, bias=False, **start) if projects else None
        self.layers = nnx.List(
            [
                DecoderLayer(config, i, attn_implementation, rngs=rngs, dtype=dtype)
                for i in range(config.num_hidden_layers)
            ]
        )
        self.gradient_checkpointing, self.checkpoint_policy = False, None
        self.layer_drop = Dropout(config.layerdrop, rngs=rngs if config.layerdrop else None)
        affine = config.layer_norm_elementwise_affine
        self.final_layer_norm = LayerNorm(hidden_size, affine=affine, dtype=dtype) if norms else None
        self.project_out = Linear(hidden_size, embed_size, bias=False, **start) if projects else None

    @property
    def config(self) -> OPTConfig:
        return self.static_config.config

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        segment_ids: Array | None = None,
        head_mask: Array | None = None,
    ) -> BaseModelOutput:
        x_BTE = (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds).astype(self.compute_dtype)
        x_BTE = on_rows(self.placement, x_BTE)
        packing = None if attention_mask is None else make_packing(attention_mask[:, -x_BTE.shape[1] :])
        past = past_key_values
        if isinstance(past, GrowingCache):
            past = grow(past, x_BTE.shape[1])
        lengths_B = None if past is None else past.lengths
        first_BT = None if segment_ids is None else first_columns(segment_ids, packing)

        x_BTD = pack(x_BTE, packing)
        if self.project_in is not None:
            x_BTD = self.project_in(x_BTD)
        rows_BT = self.position_rows(x_BTD, position_ids, packing, past, first_BT)
        x_BTD = on_rows(self.placement, x_BTD + self.embed_positions(rows_BT).astype(self.compute_dtype))

        head_mask_LN = self.split_head_mask(head_mask)
        recomputes = (
            self.gradient_checkpointing and not self.layer_drop.deterministic and past is None and not use_cache
        )
        how = dict(output_attentions=output_attentions, recomputes=recomputes, policy=self.checkpoint_policy)
        inputs, presents, attentions = [], [], []
        before_BTD = x_BTD if self.placement is not None and self.placement.gathers else None
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                inputs.append(x_BTD)
            past_layer = None if past is None else (past.keys[i], past.values[i])
            given = past_layer, lengths_B, first_BT, head_mask_LN[i]
            y_BTD, present, weights_BNTS = run_layer(layer, x_BTD, *given, before_BTD, **how)
            before_BTD = None if before_BTD is None else x_BTD
            x_BTD = self.drop_layer(x_BTD, y_BTD)
            presents.append(present)
            attentions.append(weights_BNTS)
        if self.final_layer_norm is not None:
            x_BTD = self.final_layer_norm(x_BTD)
        x_BTE = x_BTD if self.project_out is None else self.project_out(x_BTD)
        x_BTE = on_rows(self.placement, unpack(x_BTE, packing))

        return BaseModelOutput(
            x_BTE,
            self.next_cache(past, presents, packing, x_BTE) if use_cache else None,
            (*(unpack(x, packing) for x in inputs), x_BTE) if output_hidden_states else None,
            tuple(unpack_attentions(w, packing, keys_too=past is None) for w in attentions)
            if output_attentions
            else None,
        )

    def position_rows(
        self,
        x_BTD: Array,
        position_ids: Array | None,
        packing: Packing | None,
        past: Cache | None,
        first_BT: Array | None = None,
    ) -> Array:
        """Rows of the position table, [B, T] or [1, T]: the number of real tokens before each, plus the offset.

        -1, which no table has, for a position below 0 and for a real token beyond the capacity of the cache.
        """
        lengths_B = None if past is None else past.lengths
        capacity = past.capacity if past is not None and past.keys else None
        return _position_rows(position_ids, packing, lengths_B, first_BT, x_BTD.shape[:2], capacity)

    def split_head_mask(self, head_mask: Array | None) -> list[Array | None]:
        """The mask of each layer, of the heads that it has."""
        config, L = self.config, len(self.layers)
        if head_mask is None:
            return [None] * L
        masks_LN = jnp.broadcast_to(head_mask, (L, config.num_attention_heads))
        return [masks_LN[i, jnp.array(config.remaining_heads(i))] for i in range(L)]

    def drop_layer(self, x_BTD: Array, y_BTD: Array) -> Array:
        """LayerDrop (Fan et al., arXiv:1909.11556): in training, a layer is skipped with probability `layerdrop`."""
        if self.layer_drop.deterministic or not self.layer_drop.rate:
            return y_BTD
        return jnp.where(self.layer_drop(jnp.ones(())) == 0, x_BTD, y_BTD)

    def next_cache(
        self, past: Cache | None, presents: list[LayerCache], packing: Packing | None, x_BTE: Array
    ) -> Cache:
        """The cache with the tokens of this call."""
        B, T = x_BTE.shape[:2]
        new_B = jnp.full((B,), T, jnp.int32) if packing is None else packing.lengths_B
        keys, values = (tuple(present[j] for present in presents) for j in (0, 1))
        if past is None:
            return GrowingCache(keys, values, new_B)
        return type(past)(keys, values, past.lengths + new_B)


class StaticConfig:
    """A config as NNX wants the static attributes of a module: with equality and a hash, both by its fields.

    So models of equal configs share what is compiled. A function that a user has compiled keeps the switches of that
    time (`output_attentions`, ...): give them as arguments there.
    """

    def __init__(self, config: OPTConfig):
        self.config = config

    def __eq__(self, other) -> bool:
        return isinstance(other, StaticConfig) and self.config == other.config

    def __hash__(self) -> int:
        return hash(repr(self.config))


def run_layer(
    layer: DecoderLayer,
    x_BTD: Array,
    past: LayerCache | None,
    lengths_B: Array | None,
    first_BT: Array | None,
    head_mask_N: Array | None,
    before_BTD: Array | None,
    *,
    output_attentions: bool,
    recomputes: bool,
    policy: Callable | None,
) -> tuple[Array, LayerCache, Array | None]:
    """Calls a layer as one compiled function that equal layers share: traced once, and outside `jit` compiled once.

    A layer that `recomputes` keeps for its gradient its inputs and what a `policy` of `jax.checkpoint` says. On a mesh
    whose devices gather weights, `before_BTD` is what the layer before was given.
    """
    graphdef, rngs, weights = nnx.split(layer, nnx.RngState, ...)
    static = graphdef, output_attentions, recomputes, policy
    arrays = x_BTD, past, lengths_B, first_BT, head_mask_N, before_BTD
    outputs, rngs = _compiled_layer(*static, rngs, weights, *arrays)
    if not layer.dropout.deterministic:
        nnx.update(layer, rngs)
    return outputs


@functools.partial(jax.jit, static_argnames=("shape", "capacity"))
def _position_rows(position_ids, packing, lengths_B, first_BT, shape: tuple[int, int], capacity: int | None) -> Array:
    slots_BT = jnp.arange(shape[1])[None]
    if lengths_B is not None:
        slots_BT = lengths_B[:, None] + slots_BT
    if position_ids is None:
        position_ids = slots_BT if first_BT is None else slots_BT - first_BT
    elif packing is not None:
        position_ids = jnp.take_along_axis(jnp.broadcast_to(position_ids, shape), packing.order_BT, 1)
    rows_BT = jnp.where(position_ids < 0, -1, position_ids + POSITION_OFFSET)
    if capacity is not None:
        rows_BT = jnp.where(slots_BT < capacity, rows_BT, -1)
    if packing is not None:  # positions of padding, behind the real tokens, may lie outside the table
        rows_BT = jnp.where(jnp.arange(shape[1]) < packing.lengths_B[:, None], rows_BT, POSITION_OFFSET)
    return rows_BT


@functools.partial(jax.jit, static_argnames=("graphdef", "output_attentions", "recomputes", "policy"))
def _compiled_layer(graphdef, output_attentions: bool, recomputes: bool, policy, *arrays):
    def call(rngs, weights, x_BTD, past, lengths_B, first_BT, head_mask_N, before_BTD):
        layer = nnx.merge(graphdef, rngs, weights)
        pin_weights(layer.self_attn.placement, layer, before_BTD)
        outputs = layer(x_BTD, past, lengths_B, output_attentions, first_BT, head_mask_N)
        return outputs, nnx.state(layer, nnx.RngState)

    if not recomputes and arrays[-1] is not None:  # keeps all, but gathers weights once more
        recomputes, policy = True, jax.checkpoint_policies.everything_saveable
    return (jax.checkpoint(call, policy=policy) if recomputes else call)(*arrays)
