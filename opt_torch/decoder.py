"""The decoder, PyTorch: embeddings, layers, final norm, projections (Zhang et al., arXiv:2205.01068, section 2)."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opt_core.config import POSITION_OFFSET, OPTConfig
from opt_core.outputs import BaseModelOutput
from opt_torch.attention import Attention, LayerCache
from opt_torch.cache import Cache, GrowingCache, Slots, grow, slots_behind
from opt_torch.flash import PACKAGES
from opt_torch.flex import BlockMask, make_mask
from opt_torch.layers import ACTIVATION_FUNCTIONS, Embedding, LayerNorm, Linear
from opt_torch.packing import Packing, first_columns, make_packing, pack, unpack, unpack_attentions
from opt_torch.segments import Segments, make_segments


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each with a residual; norms before them, or after them (350m)."""

    def __init__(self, config: OPTConfig, layer: int, attn_implementation: str):
        super().__init__()
        self.pre_norm = config.do_layer_norm_before
        self.dropout = nn.Dropout(config.dropout)
        activation = config.activation_function
        self.activation = activation if callable(activation) else ACTIVATION_FUNCTIONS[activation]
        affine, shape = config.layer_norm_elementwise_affine, dict(bias=config.enable_bias, init_std=config.init_std)
        self.self_attn = Attention(config, layer, attn_implementation)
        self.self_attn_layer_norm = LayerNorm(config.hidden_size, affine=affine)
        self.fc1 = Linear(config.hidden_size, config.ffn_dim, **shape)
        self.fc2 = Linear(config.ffn_dim, config.hidden_size, **shape)
        self.final_layer_norm = LayerNorm(config.hidden_size, affine=affine)

    def forward(
        self,
        x_BTD: Tensor,
        past: LayerCache | None,
        slots: Slots | None,
        output_attentions: bool,
        first_BT: Tensor | None = None,
        segments: Segments | BlockMask | None = None,
        head_mask_N: Tensor | None = None,
    ) -> tuple[Tensor, LayerCache, Tensor | None]:
        residual_BTD = x_BTD
        if self.pre_norm:
            x_BTD = self.self_attn_layer_norm(x_BTD)
        given = past, slots, output_attentions, first_BT, segments, head_mask_N
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
        return x_BTD, present, weights_BNTS


class Decoder(nn.Module):
    """Tokens [B, T] to hidden states [B, T, E]. Arguments are checked before they come here."""

    def __init__(self, config: OPTConfig, attn_implementation: str):
        super().__init__()
        self.config = config
        embed_size, hidden_size, std = config.word_embed_proj_dim, config.hidden_size, config.init_std
        self.embed_tokens = Embedding(config.vocab_size, embed_size, init_std=std, zero_row=config.pad_token_id)
        self.embed_positions = Embedding(config.max_position_embeddings + POSITION_OFFSET, hidden_size, init_std=std)
        self.project_in = self.project_out = None
        if config.has_projections:
            self.project_in = Linear(embed_size, hidden_size, bias=False, init_std=std)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, attn_implementation) for i in range(config.num_hidden_layers)
        )
        self.final_layer_norm = None
        if config.has_final_layer_norm:
            self.final_layer_norm = LayerNorm(hidden_size, affine=config.layer_norm_elementwise_affine)
        if config.has_projections:
            self.project_out = Linear(hidden_size, embed_size, bias=False, init_std=std)
        self.gradient_checkpointing: dict | None = None  # options of `checkpoint`, where training is to use it

    def forward(
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
    ) -> BaseModelOutput:
        x_BTE = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        packing = None if attention_mask is None else make_packing(attention_mask[:, -x_BTE.shape[1] :])
        past = past_key_values
        if isinstance(past, GrowingCache):
            past = grow(past, x_BTE.shape[1])
        lengths_B = None if past is None else past.lengths
        first_BT = None if segment_ids is None else first_columns(segment_ids, packing)

        x_BTD = pack(x_BTE, packing)
        if self.project_in is not None:
            x_BTD = self.project_in(x_BTD)
        x_BTD = x_BTD + self.embed_positions(self.position_rows(x_BTD, position_ids, packing, lengths_B, first_BT))

        slots = None if past is None else slots_behind(past.lengths, x_BTD.shape[1])
        segments = None if past is not None else self._segments(x_BTD, first_BT, packing)
        head_mask_LN = self.split_head_mask(head_mask)
        device = x_BTD.device
        recomputes = self.gradient_checkpointing is not None and self.training and past is None and not use_cache
        inputs, presents, attentions = [], [], []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                inputs.append(x_BTD.to(device))
            past_layer = None if past is None else (past.keys[i], past.values[i])
            given = past_layer, slots, output_attentions, first_BT, segments, head_mask_LN[i]
            if recomputes:
                y_BTD, present, weights_BNTS = checkpoint(layer, x_BTD, *given, **self.gradient_checkpointing)
            else:
                y_BTD, present, weights_BNTS = layer(x_BTD, *given)
            x_BTD = self.drop_layer(x_BTD, y_BTD)
            presents.append(present if use_cache else None)
            attentions.append(None if weights_BNTS is None else weights_BNTS.to(device))
        x_BTD = x_BTD.to(device)  # the last layer may have been on another one
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
        B, T = x_BTD.shape[:2]
        if position_ids is None:
            position_ids = torch.arange(T, device=x_BTD.device)[None]
            if lengths_B is not None:
                position_ids = lengths_B[:, None] + position_ids
            if first_BT is not None:
                position_ids = position_ids - first_BT
        elif packing is not None:
            position_ids = position_ids.expand(B, T).gather(1, packing.order_BT)
        if packing is not None:  # positions of padding, behind the real tokens, may lie outside the table
            position_ids = position_ids.clamp(0, self.config.max_position_embeddings - 1)
        return position_ids + POSITION_OFFSET

    def _segments(self, x_BTD: Tensor, first_BT: Tensor | None, packing: Packing | None) -> Segments | BlockMask | None:
        """The documents, without padding, for layers with kernels of variable length; for FlexAttention its blocks."""
        names = {layer.self_attn.attn_implementation for layer in self.layers}
        if torch.compiler.is_compiling():
            return None
        if names == {"flex_attention"}:
            return make_mask(*x_BTD.shape[:2], first_BT, x_BTD.device)
        if first_BT is None and (packing is None or names.isdisjoint(PACKAGES)):
            return None
        lengths_B = None if packing is None else packing.lengths_B
        return make_segments(*x_BTD.shape[:2], first_BT, lengths_B, x_BTD.device)

    def split_head_mask(self, head_mask: Tensor | None) -> list[Tensor | None]:
        """The mask of each layer, of the heads that it has."""
        if head_mask is None:
            return [None] * len(self.layers)
        masks_LN = head_mask.expand(len(self.layers), -1)
        return [masks_LN[i, self.config.remaining_heads(i)] for i in range(len(self.layers))]

    def drop_layer(self, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
        """LayerDrop (Fan et al., arXiv:1909.11556): in training, a layer is skipped with probability `layerdrop`."""
        if not self.training or not self.config.layerdrop:
            return y_BTD
        return torch.where(torch.rand((), device=x_BTD.device) < self.config.layerdrop, x_BTD, y_BTD)

    def next_cache(
        self, past: Cache | None, presents: list[LayerCache], packing: Packing | None, x_BTE: Tensor
    ) -> Cache:
        """The cache with the tokens of this call."""
        B, T = x_BTE.shape[:2]
        new_B = torch.full((B,), T, device=x_BTE.device) if packing is None else packing.lengths_B
        keys, values = (tuple(present[j] for present in presents) for j in (0, 1))
        if past is None:
            return GrowingCache(keys, values, new_B)
        return type(past)(keys, values, past.lengths + new_B)
