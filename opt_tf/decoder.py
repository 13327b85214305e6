"""The decoder, TensorFlow: embeddings, layers, final norm, projections (Zhang et al., arXiv:2205.01068, section 2)."""

import tensorflow as tf
from tensorflow import Tensor

from opt_core.config import POSITION_OFFSET, OPTConfig
from opt_core.outputs import BaseModelOutput
from opt_tf.attention import Attention, LayerCache
from opt_tf.cache import Cache, GrowingCache, grow
from opt_tf.layers import ACTIVATION_FUNCTIONS, Embedding, LayerNorm, Linear, Module, dims, drop_values
from opt_tf.packing import Packing, first_columns, make_packing, pack, unpack, unpack_attentions


class DecoderLayer(Module):
    """Attention and feed-forward, each with a residual; norms before them, or after them (350m)."""

    def __init__(self, config: OPTConfig, attn_implementation: str, dtype=None):
        super().__init__(dtype)
        self.pre_norm = config.do_layer_norm_before
        self.dropout = config.dropout
        activation = config.activation_function
        self.activation = activation if callable(activation) else ACTIVATION_FUNCTIONS[activation]
        affine = dict(affine=config.layer_norm_elementwise_affine, dtype=dtype)
        shape = dict(bias=config.enable_bias, init_std=config.init_std, dtype=dtype)
        self.self_attn = Attention(config, attn_implementation, dtype)
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
        training: bool = False,
        first_BT: Tensor | None = None,
    ) -> tuple[Tensor, LayerCache, Tensor | None]:
        dropout = self.dropout if training else 0.0
        residual_BTD = x_BTD
        if self.pre_norm:
            x_BTD = self.self_attn_layer_norm(x_BTD)
        x_BTD, present, weights_BNTS = self.self_attn(x_BTD, past, lengths_B, output_attentions, training, first_BT)
        x_BTD = residual_BTD + drop_values(x_BTD, dropout)
        if not self.pre_norm:
            x_BTD = self.self_attn_layer_norm(x_BTD)

        residual_BTD = x_BTD
        if self.pre_norm:
            x_BTD = self.final_layer_norm(x_BTD)
        x_BTD = self.fc2(self.activation(self.fc1(x_BTD)))
        x_BTD = residual_BTD + drop_values(x_BTD, dropout)
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
        self.layers = [DecoderLayer(config, attn_implementation, dtype) for _ in range(config.num_hidden_layers)]
        # Keras 3 keeps lists for itself: without this, tf.train.Checkpoint would silently leave out every layer.
        self._track_trackable(tf.__internal__.tracking.wrap(list(self.layers)), "layers")
        self.final_layer_norm = None
        if config.has_final_layer_norm:
            self.final_layer_norm = LayerNorm(hidden_size, affine=config.layer_norm_elementwise_affine, dtype=dtype)
        if config.has_projections:
            self.project_out = Linear(hidden_size, embed_size, bias=False, **init)

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
        training: bool = False,
    ) -> BaseModelOutput:
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

        inputs, presents, attentions = [], [], []
        for i, layer in enumerate(self.layers):
            inputs.append(x_BTD)
            past_layer = None if past is None else (past.keys[i], past.values[i])
            y_BTD, present, weights_BNTS = layer(x_BTD, past_layer, lengths_B, output_attentions, training, first_BT)
            x_BTD = self.drop_layer(x_BTD, y_BTD, training)
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

    def drop_layer(self, x_BTD: Tensor, y_BTD: Tensor, training: bool) -> Tensor:
        """LayerDrop (Fan et al., arXiv:1909.11556): in training, a layer is skipped with probability `layerdrop`."""
        if not training or not self.config.layerdrop:
            return y_BTD
        return tf.where(tf.random.uniform([]) < self.config.layerdrop, x_BTD, y_BTD)

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
