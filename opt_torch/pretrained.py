"""What the published classes share, PyTorch: the checked call, embeddings, cache, loading."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from opt_core.checks import check_config, check_inputs
from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.keywords import CALLING, arguments_of, check_keywords
from opt_core.lora import LoraConfig
from opt_core.outputs import BaseModelOutput
from opt_core.sharding import RULES, Mesh
from opt_torch.attention import check_implementation
from opt_torch.cache import Cache, init_cache
from opt_torch.decoder import Decoder
from opt_torch.inputs import as_index, as_tensor, known, known_cache
from opt_torch.layers import Embedding, Linear
from opt_torch.loading import LoadingMixin, accept_published_names
from opt_torch.surgery import SurgeryMixin


class OPTPreTrainedModel(SurgeryMixin, LoadingMixin, nn.Module):
    """What the four classes share. `task` is the name that the weight schema gives to the class."""

    task: ClassVar[str]
    hf_device_map: dict[str, int | str]  # module to place; accelerate asks whether it is there: only by `device_map`
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer"]  # accelerate asks: each is to be on one device
    accepts_loss_kwargs: ClassVar[bool] = False  # asked by transformers' Trainer: it is not to send num_items_in_batch

    def __init__(self, config: OPTConfig, *, attn_implementation: str = "sdpa"):
        super().__init__()
        check_config(config)
        check_implementation(attn_implementation, config)
        self.register_load_state_dict_pre_hook(accept_published_names)
        self.config = config
        self.attn_implementation = attn_implementation
        self.lora: LoraConfig | None = None
        self.device_mesh = None  # PyTorch's, where `opt_torch.sharding` has cut the weights
        self.mesh: Mesh | None = None  # the same for `opt_core.sharding`
        self.rules = RULES  # by which they were cut
        self.head_parts = 1  # devices that share the heads of a layer
        self.offloaded: Mapping[str, Tensor] | None = None  # the weights that accelerate brings when they are needed

    @property
    def base_model(self) -> "OPTPreTrainedModel":
        return self.model

    @property
    def dtype(self) -> torch.dtype:
        return self.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        """Where tokens go; of weights that are brought there when they are needed, where that is."""
        embeddings = self.get_input_embeddings()
        hook = getattr(embeddings, "_hf_hook", None) if embeddings.weight.is_meta else None
        return embeddings.weight.device if hook is None else torch.device(hook.execution_device)

    def set_attn_implementation(self, attn_implementation: str) -> None:
        check_implementation(attn_implementation, self.config)
        self.attn_implementation = attn_implementation
        for layer in self.base_model.decoder.layers:
            layer.self_attn.attn_implementation = attn_implementation

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping | None = None) -> None:
        """From here on, training keeps the inputs of layers alone, and computes the rest again for the gradients.

        The options are those of `torch.utils.checkpoint.checkpoint`.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.base_model.decoder.gradient_checkpointing = options

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.decoder.gradient_checkpointing = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.base_model.decoder.gradient_checkpointing is not None

    def num_parameters(self, only_trainable: bool = False) -> int:
        """The number of parameters, a tied head counted once."""
        parameters = dict(self.named_parameters())
        if self.config.tie_word_embeddings:
            parameters.pop("lm_head.weight", None)  # which is another than the embeddings where accelerate brings both
        return sum(p.numel() for p in parameters.values() if p.requires_grad or not only_trainable)

    def init_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty cache for `past_key_values`, for `batch_size` rows of up to `capacity` tokens."""
        made_for = self.config, batch_size, capacity
        return init_cache(*made_for, dtype=self.dtype, device=self.device, head_parts=self.head_parts)

    # -- embeddings ---------------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> Embedding:
        return self.base_model.decoder.embed_tokens

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        self.base_model.decoder.embed_tokens = embeddings
        self.tie_weights()

    def get_output_embeddings(self) -> Linear | None:
        return None

    def get_decoder(self) -> Decoder:
        return self.base_model.decoder

    def tie_weights(self) -> None:
        """Makes the head share the word embeddings again; nothing to do for a class without one."""

    def check_whole(self, what: str) -> None:
        """Refuses a model that is sharded or spread over devices: others know its weights and modules by now."""
        if self.mesh is not None:
            problem = f"model: expected one that is not sharded, got one over {self.mesh}; save it and load it whole"
            raise InputError(what, [problem])
        if self.offloaded is not None:
            raise InputError(what, ["model: expected one on one device; load it without device_map"])

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
        # What is no tensor yet is checked where it is, not sent to a device and back.
        check_inputs(
            self.config,
            input_ids=known(as_index(input_ids, "cpu")),
            attention_mask=known(as_tensor(attention_mask, "cpu")),
            position_ids=known(as_index(position_ids, "cpu")),
            inputs_embeds=known(as_tensor(inputs_embeds, "cpu"), values=False),
            cache=known_cache(past_key_values, self.head_parts),
            logits_to_keep=logits_to_keep,
            segment_ids=known(as_index(segment_ids, "cpu")),
            use_cache=use_cache,
            head_mask=known(as_tensor(head_mask, "cpu")),
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
        config, device = self.config, self.device
        check_keywords(unknown, arguments_of(self.forward), CALLING)
        given = (input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, logits_to_keep)
        self.check_inputs(*given, segment_ids, use_cache, head_mask)
        attention_mask = as_tensor(attention_mask, device)
        if attention_mask is not None and not torch.compiler.is_compiling() and attention_mask.all():
            attention_mask = None  # nothing to pack, and no mask where none is needed
        return self.base_model.decoder(
            as_index(input_ids, device),
            attention_mask,
            as_index(position_ids, device),
            as_tensor(inputs_embeds, device, self.dtype),
            past_key_values,
            config.use_cache and not self.training and segment_ids is None if use_cache is None else use_cache,
            config.output_attentions if output_attentions is None else output_attentions,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            as_index(segment_ids, device),
            as_tensor(head_mask, device, self.dtype),
        )

    def current_mask(self, attention_mask, tokens: int) -> Tensor | None:
        """The columns of a mask that belong to the tokens of this call."""
        attention_mask = as_tensor(attention_mask, self.device)
        return None if attention_mask is None else attention_mask[:, -tokens:]
