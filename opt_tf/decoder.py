"""The decoder, TensorFlow: embeddings, layers, final norm, projections (Zhang et al., arXiv:2205.01068, section 2)."""

import tensorflow as tf
from tensorflow import Tensor

from opt_core.config import POSITION_OFFSET, OPTConfig
from opt_core.outputs import BaseModelOutput
from opt_tf.attention import DROPPED, NO_SEEDS, Attention, LayerCache
from opt_tf.cache import Cache, GrowingCache, grow
from opt_tf.layers import ACTIVATION_FUNCTIONS, Embedding, LayerNorm, Linear, Module, dims, drop_values
from opt_tf.packing import Packing, first_columns, make_packing, pack, unpack, unpack_attentions


class DecoderLayer(Module):
    """Attention and feed-forward, each with a residual; norms before them, or after them (350m)."""

    def __init__(self, config: OPTConfig, layer: int, attn_implementation: str, dtype=None):
        super().__init__(dtype)
        self.pre_norm = config.do_layer_norm_before
        self.dropout = config.dropout
        activation = config.activation_function
        self.activation = activation if callable(activation) else ACTIVATION_FUNCTIONS[activation]
        affine = dict(affine=config.layer_norm_elementwise_affine, dtype=dtype)
        shape = dict(bias=config.enable_bias, init_std=config.init_std, dtype=dtype)
        self.self_attn = Attention(config, layer, attn_implementation, dtype)
        self.self_attn_layer_norm = LayerNorm(config.hidden_size, **affine)
        self.fc1 = Linear(config.hidden_size, config.ffn_dim, **shape)
        self.fc2 = Linear(config.ffn_dim, config.hidden_size, **shape)
        self.final_layer_norm = LayerNorm(config.hidden_size, **affine)

    def call(
        self,
        x_BTD: Tensor,
        past: LayerCache | None,
        lengths_B: Tensor | None,
        output_attentions: bool,
        first_BT: Tensor | None = None,
        head_mask_N: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> tuple[Tensor, LayerCache, Tensor | None]:
        """In training there are `seeds` [`DROPPED`, 2]; the same ones drop the same values."""
        dropout = 0.0 if seeds is None else self.dropout
        seeds = NO_SEEDS if seeds is None else dict(zip(DROPPED, tf.unstack(seeds), strict=True))
        residual_BTD = x_BTD
        if self.pre_norm:
            x_BTD = self.self_attn_layer_norm(x_BTD)
        given = past, lengths_B, output_attentions, first_BT, head_mask_N, seeds
        x_BTD, present, weights_BNTS = self.self_attn(x_BTD, *given)
        x_BTD = residual_BTD + drop_values(x_BTD, dropout, seeds["attention"])
        if not self.pre_norm:
            x_BTD = self.self_attn_layer_norm(x_BTD)

        residual_BTD = x_BTD
        if self.pre_norm:
            x_BTD = self.final_layer_norm(x_BTD)
        x_BTD = self.fc2(self.activation(self.fc1(x_BTD, seeds["fc1"])), seeds["fc2"])
        x_BTD = residual_BTD + drop_values(x_BTD, dropout, seeds["feed_forward"])
        if not self.pre_norm:
            x_BTD = self.final_layer_norm(x_BTD)
        return x_BTD, present, weights_BNTS


class Decoder(Module):
    """Tokens [B, T] to hidden states [B, T, E]. Arguments are checked before they come here."""

    def __init__(self, config: OPTConfig, attn_implementation: str, dtype=None):
        super().__init__(dtype)
        self.config = config
        embed_size, hidden_size = config.word_embed_proj_dim, config.hidden_size
        init = dict(init_std=config.init_std, dtype=dtype)
        self.embed_tokens = Embedding(config.vocab_size, embed_size, zero_row=config.pad_token_id, **init)
        self.embed_positions = Embedding(config.max_position_embeddings + POSITION_OFFSET, hidden_size, **init)
        self.project_in = self.project_out = None
        if config.has_projections:
            self.project_in = Linear(embed_size, hidden_size, bias=False, **init)
        self.layers = [DecoderLayer(config, i, attn_implementation, dtype) for i in range(config.num_hidden_layers)]
        # Keras 3 keeps lists for itself: without this, tf.train.Checkpoint would silently leave out every layer.
        self._track_trackable(tf.__internal__.tracking.wrap(list(self.layers)), "layers")
        self.final_layer_norm = None
        if config.has_final_layer_norm:
            self.final_layer_norm = LayerNorm(hidden_size, affine=config.layer_norm_elementwise_affine, dtype=dtype)
        if config.has_projections:
            self.project_out = Linear(hidden_size, embed_size, bias=False, **init)
        self.gradient_checkpointing = False

    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        segment_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> BaseModelOutput:
        """In training there is a `seed` [2], of all that is dropped."""
        x_BTE = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        T = dims(x_BTE)[1]
        packing = None if attention_mask is None else make_packing(attention_mask[:, -T:])
        past = past_key_values
        if isinstance(past, GrowingCache):
            past = grow(past, T)
        lengths_B = None if past is None else past.lengths
        first_BT = None if segment_ids is None else first_columns(segment_ids, packing)

        x_BTD = pack(x_BTE, packing)
        if self.project_in is not None:
            x_BTD = self.project_in(x_BTD)
        x_BTD = x_BTD + self.embed_positions(self.position_rows(x_BTD, position_ids, packing, lengths_B, first_BT))

        seeds_L = self.split_seed(seed)
        head_mask_LN = self.split_head_mask(head_mask)
        recomputes = self.gradient_checkpointing and seed is not None and past is None and not use_cache
        inputs, presents, attentions = [], [], []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                inputs.append(x_BTD)
            past_layer = None if past is None else (past.keys[i], past.values[i])
            given = past_layer, lengths_B, output_attentions, first_BT, head_mask_LN[i], seeds_L[i]
            y_BTD, present, weights_BNTS = (_recomputed(layer) if recomputes else layer)(x_BTD, *given)
            x_BTD = self.drop_layer(x_BTD, y_BTD, seeds_L[i])
            presents.append(present)
            attentions.append(weights_BNTS)
        if self.final_layer_norm is not None:
            x_BTD = self.final_layer_norm(x_BTD)
        x_BTE = x_BTD if self.project_out is None else self.project_out(x_BTD)
        x_BTE = unpack(x_BTE, packing)

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
        x_BTD: Tensor,
        position_ids: Tensor | None,
        packing: Packing | None,
        lengths_B: Tensor | None,
        first_BT: Tensor | None = None,
    ) -> Tensor:
        """Rows of the position table, [B, T] or [1, T]: the number of real tokens before each, plus the offset."""
        B, T, _ = dims(x_BTD)
        columns_1T = tf.range(T, dtype=tf.int64)[None]
        if position_ids is None:
            position_ids = columns_1T
            if lengths_B is not None:
                position_ids = lengths_B[:, None] + position_ids
            if first_BT is not None:
                position_ids = position_ids - tf.cast(first_BT, tf.int64)
        elif packing is not None:
            position_ids = tf.gather(tf.broadcast_to(position_ids, [B, T]), packing.order_BT, axis=1, batch_dims=1)
        if packing is not None:  # positions of padding, behind the real tokens, may lie outside the table
            position_ids = tf.where(columns_1T < packing.lengths_B[:, None], position_ids, 0)
        # A row before the table's positions is no error of `gather` by itself.
        return tf.where(position_ids >= 0, position_ids + POSITION_OFFSET, -1)

    def split_seed(self, seed: Tensor | None) -> list[Tensor | None]:
        """Seeds [`DROPPED`, 2] for each layer."""
        if seed is None or not self.layers:
            return [None] * len(self.layers)
        shape = [len(self.layers), len(DROPPED), 2]
        return tf.unstack(tf.random.stateless_uniform(shape, seed, None, None, tf.int32, alg="philox"))

    def split_head_mask(self, head_mask: Tensor | None) -> list[Tensor | None]:
        """The mask of each layer, of the heads that it has."""
        if head_mask is None:
            return [None] * len(self.layers)
        masks_LN = tf.broadcast_to(head_mask, [len(self.layers), self.config.num_attention_heads])
        return [tf.gather(masks_LN[i], self.config.remaining_heads(i)) for i in range(len(self.layers))]

    def drop_layer(self, x_BTD: Tensor, y_BTD: Tensor, seeds: Tensor | None) -> Tensor:
        """LayerDrop (Fan et al., arXiv:1909.11556): in training, a layer is skipped with probability `layerdrop`."""
        if seeds is None or not self.config.layerdrop:
            return y_BTD
        drawn = tf.random.stateless_uniform([], seeds[DROPPED.index("layer")], alg="philox")
        return tf.where(drawn < self.config.layerdrop, x_BTD, y_BTD)

    def next_cache(
        self, past: Cache | None, presents: list[LayerCache], packing: Packing | None, x_BTE: Tensor
    ) -> Cache:
        """The cache with the tokens of this call."""
        B, T, _ = dims(x_BTE)
        new_B = tf.fill([B], tf.cast(T, tf.int64)) if packing is None else packing.lengths_B
        keys, values = (tuple(present[j] for present in presents) for j in (0, 1))
        if past is None:
            return GrowingCache(keys, values, new_B)
        return type(past)(keys, values, past.lengths + new_B)


def _recomputed(layer: DecoderLayer):
    """The layer without a cache, of which nothing is kept for its gradient but the input: it is computed again."""

    def call(x_BTD, past, lengths_B, output_attentions, first_BT, head_mask_N, seeds):
        @tf.recompute_grad
        def outputs(x_BTD, *head_mask):
            y_BTD, _, weights_BNTS = layer(
                x_BTD, None, None, output_attentions, first_BT, *(head_mask or [None]), seeds
            )
            return [y_BTD] if weights_BNTS is None or not output_attentions else [y_BTD, weights_BNTS]

        y_BTD, *weights_BNTS = outputs(x_BTD, *([] if head_mask_N is None else [head_mask_N]))
        return y_BTD, None, *(weights_BNTS or [None])

    return call
