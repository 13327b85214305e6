"""What the published classes share, Flax NNX: the checked call, embeddings, cache, loading."""

import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from opt_core.checks import check_config, check_inputs
from opt_core.config import OPTConfig
from opt_core.keywords import CALLING, arguments_of, check_keywords
from opt_core.lora import LoraConfig
from opt_core.outputs import BaseModelOutput
from opt_core.sharding import Mesh
from opt_flax.attention import check_implementation
from opt_flax.cache import Cache, init_cache
from opt_flax.decoder import Decoder, StaticConfig
from opt_flax.inputs import as_index, as_tensor, is_readable, known, known_cache
from opt_flax.layers import Embedding, Linear
from opt_flax.loading import LoadingMixin
from opt_flax.sharding import Placement
from opt_flax.surgery import SurgeryMixin


class FlaxOPTPreTrainedModel(SurgeryMixin, LoadingMixin, nnx.Module):
    """What the four classes share. `task` is the name that the weight schema gives to the class."""

    task: ClassVar[str]

    def __init__(self, config: OPTConfig, *, attn_implementation: str = "sdpa", dtype=jnp.float32):
        check_config(config)
        check_implementation(attn_implementation, config, dtype)
        self.static_config = StaticConfig(config)
        self.attn_implementation = attn_implementation
        self.lora: LoraConfig | None = None
        self.placement: Placement | None = None

    @property
    def config(self) -> OPTConfig:
        return self.static_config.config

    @property
    def training(self) -> bool:
        """Whether dropout is on: so it is in a new model; `train()` and `eval()` of NNX change it."""
        return not self.base_model.decoder.layer_drop.deterministic

    @property
    def base_model(self) -> "FlaxOPTPreTrainedModel":
        return self.model

    @property
    def dtype(self) -> jnp.dtype:
        return self.get_input_embeddings().weight.dtype

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of what is computed and returned, to which weights of another are rounded where they are used."""
        return self.base_model.decoder.compute_dtype

    @property
    def device_mesh(self) -> jax.sharding.Mesh | None:
        """The devices that the model is on, where `shard_model` or `from_pretrained` has put it on several."""
        return None if self.placement is None else self.placement.device_mesh

    @property
    def mesh(self) -> Mesh | None:
        """The names and sizes of the axes of `device_mesh`."""
        return None if self.placement is None else self.placement.mesh

    def set_placement(self, placement: Placement | None) -> None:
        """Says where arrays lie, to all modules that ask; `opt_flax.sharding.place` puts them there."""
        attentions = (layer.self_attn for layer in self.base_model.decoder.layers)
        for owner in (self, self.base_model, self.base_model.decoder, *attentions):
            owner.placement = placement

    @property
    def device(self) -> jax.Device:
        return next(iter(self.get_input_embeddings().weight.get_value().devices()))

    def set_attn_implementation(self, attn_implementation: str) -> None:
        check_implementation(attn_implementation, self.config, self.compute_dtype)
        self.attn_implementation = attn_implementation
        for layer in self.base_model.decoder.layers:
            layer.self_attn.attn_implementation = attn_implementation

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping | None = None) -> None:
        """From here on, training keeps the inputs of layers alone, and computes the rest again for the gradients.

        Args:
            gradient_checkpointing_kwargs: a `policy` of `jax.checkpoint_policies` says what else is kept. What other
                frameworks have means nothing here.
        """
        decoder = self.base_model.decoder
        decoder.gradient_checkpointing = True
        decoder.checkpoint_policy = (gradient_checkpointing_kwargs or {}).get("policy")

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.decoder.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.base_model.decoder.gradient_checkpointing

    def num_parameters(self, only_trainable: bool = False) -> int:
        """The number of parameters, a tied head counted once."""
        return sum(p.size for p in jax.tree.leaves(nnx.state(self, self.trainable if only_trainable else nnx.Param)))

    @property
    def trainable(self) -> type[nnx.Param]:
        """The variables that training changes, as NNX's `wrt`: adapters where there are some, else all parameters."""
        return nnx.Param if self.lora is None else nnx.LoRAParam

    def init_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty cache for `past_key_values`, for `batch_size` rows of up to `capacity` tokens."""
        made = functools.partial(init_cache, self.config, batch_size, capacity, dtype=self.compute_dtype)
        if self.placement is None:
            return made(device=self.device)
        buffers, lengths = self.placement.cache(batch_size)
        return jax.jit(made, out_shardings=Cache(buffers, buffers, lengths))()

    # -- embeddings ---------------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> Embedding:
        return self.base_model.decoder.embed_tokens

    def set_input_embeddings(self, embeddings: Embedding) -> None:
        self.base_model.decoder.embed_tokens = embeddings
        self.tie_weights()

    def get_output_embeddings(self) -> Linear | None:
        return None

    def get_decoder(self) -> Decoder:
        return self.base_model.decoder

    def tie_weights(self) -> None:
        """Makes the head share the word embeddings again; nothing to do for a class without one."""

    # -- the call -----------------------------------------------------------------------------------------------------

    def check_inputs(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values: Cache | None = None,
        logits_to_keep: int = 0,
        segment_ids=None,
        use_cache: bool | None = None,
        head_mask=None,
    ) -> None:
        """Raises one InputError with everything wrong; to call before a compiled function, which sees no values."""
        check_inputs(
            self.config,
            input_ids=known(input_ids),
            attention_mask=known(attention_mask),
            position_ids=known(position_ids),
            inputs_embeds=known(inputs_embeds, values=False),
            cache=known_cache(past_key_values),
            logits_to_keep=logits_to_keep,
            segment_ids=known(as_index(segment_ids)),
            use_cache=use_cache,
            head_mask=known(as_tensor(head_mask)),
        )

    def decode(
        self,
        input_ids,
        attention_mask,
        position_ids,
        inputs_embeds,
        past_key_values: Cache | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        unknown: Mapping[str, object],
        logits_to_keep: int = 0,
        segment_ids=None,
        head_mask=None,
    ) -> BaseModelOutput:
        """Takes defaults from the config, checks everything, and runs the decoder."""
        config = self.config
        check_keywords(unknown, arguments_of(self.__call__), CALLING)
        given = (input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, logits_to_keep)
        self.check_inputs(*given, segment_ids, use_cache, head_mask)
        attention_mask = as_tensor(attention_mask)
        if attention_mask is not None and is_readable(attention_mask) and np.asarray(attention_mask).all():
            attention_mask = None  # nothing to pack, and no mask where none is needed
        return self.base_model.decoder(
            as_index(input_ids),
            attention_mask,
            as_index(position_ids),
            as_tensor(inputs_embeds, self.compute_dtype),
            past_key_values,
            config.use_cache and not self.training and segment_ids is None if use_cache is None else use_cache,
            config.output_attentions if output_attentions is None else output_attentions,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            as_index(segment_ids),
            as_tensor(head_mask, self.compute_dtype),
        )

    def current_mask(self, attention_mask, tokens: int) -> Array | None:
        """The columns of a mask that belong to the tokens of this call."""
        attention_mask = as_tensor(attention_mask)
        return None if attention_mask is None else attention_mask[:, -tokens:]
