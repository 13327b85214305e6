"""The published classes, PyTorch: base model, causal language model, sequence classification, question answering."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from opt_core.checks import (
    ATTENTION_IMPLEMENTATIONS,
    arguments_of,
    check_choice,
    check_inputs,
    check_keywords,
    check_labels,
)
from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.outputs import BaseModelOutput, CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput
from opt_torch import losses
from opt_torch.cache import Cache, init_cache
from opt_torch.decoder import Decoder
from opt_torch.generation import GenerationMixin
from opt_torch.inputs import as_index, as_tensor, known, known_cache
from opt_torch.layers import Embedding, Linear
from opt_torch.loading import LoadingMixin


class OPTPreTrainedModel(LoadingMixin, nn.Module):
    """What the four classes share. `task` is the name that the weight schema gives to the class."""

    task: ClassVar[str]

    def __init__(self, config: OPTConfig, *, attn_implementation: str = "sdpa"):
        super().__init__()
        config.check()
        check_choice("attn_implementation", attn_implementation, ATTENTION_IMPLEMENTATIONS)
        self.config = config
        self.attn_implementation = attn_implementation

    @property
    def base_model(self) -> "OPTModel":
        return self.model

    @property
    def dtype(self) -> torch.dtype:
        return self.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        return self.get_input_embeddings().weight.device

    def set_attn_implementation(self, attn_implementation: str) -> None:
        check_choice("attn_implementation", attn_implementation, ATTENTION_IMPLEMENTATIONS)
        self.attn_implementation = attn_implementation
        for layer in self.base_model.decoder.layers:
            layer.self_attn.attn_implementation = attn_implementation

    def num_parameters(self, only_trainable: bool = False) -> int:
        """The number of parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def init_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty cache for `past_key_values`, for `batch_size` rows of up to `capacity` tokens."""
        return init_cache(self.config, batch_size, capacity, dtype=self.dtype, device=self.device)

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

    def resize_token_embeddings(self, new_num_tokens: int, pad_to_multiple_of: int | None = None) -> Embedding:
        """Keeps the first rows of the word embeddings (and of an untied head); new rows start as in a new model."""
        if pad_to_multiple_of:
            new_num_tokens = -(-new_num_tokens // pad_to_multiple_of) * pad_to_multiple_of
        config = self.config.replace(vocab_size=new_num_tokens)
        old = self.get_input_embeddings()
        new = Embedding(new_num_tokens, config.word_embed_proj_dim, init_std=config.init_std)
        self.base_model.decoder.embed_tokens = _with_rows_of(old, new)
        head = self.get_output_embeddings()
        if head is not None and not config.tie_word_embeddings:
            self.lm_head = _with_rows_of(
                head, Linear(config.word_embed_proj_dim, new_num_tokens, bias=False, init_std=config.init_std)
            )
        self.config.vocab_size = new_num_tokens
        self.tie_weights()
        return self.get_input_embeddings()

    # -- the call -----------------------------------------------------------------------------------------------------

    def check_inputs(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values: Cache | None = None,
        logits_to_keep: int = 0,
    ) -> None:
        """Raises one InputError with everything wrong; for use before a compiled function, which cannot check values."""
        check_inputs(
            self.config,
            input_ids=known(as_index(input_ids, self.device)),
            attention_mask=known(as_tensor(attention_mask, self.device)),
            position_ids=known(as_index(position_ids, self.device)),
            inputs_embeds=known(as_tensor(inputs_embeds, self.device), values=False),
            cache=known_cache(past_key_values),
            logits_to_keep=logits_to_keep,
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
        unknown: Iterable[str],
        logits_to_keep: int = 0,
    ) -> BaseModelOutput:
        """Takes defaults from the config, checks everything, and runs the decoder."""
        config, device = self.config, self.device
        check_keywords(unknown, arguments_of(self.forward))
        self.check_inputs(input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, logits_to_keep)
        attention_mask = as_tensor(attention_mask, device)
        if attention_mask is not None and not torch.compiler.is_compiling() and attention_mask.all():
            attention_mask = None  # nothing to pack, and no mask where none is needed
        return self.base_model.decoder(
            as_index(input_ids, device),
            attention_mask,
            as_index(position_ids, device),
            as_tensor(inputs_embeds, device, self.dtype),
            past_key_values,
            config.use_cache and not self.training if use_cache is None else use_cache,
            config.output_attentions if output_attentions is None else output_attentions,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )

    def current_mask(self, attention_mask, tokens: int) -> Tensor | None:
        """The columns of a mask that belong to the tokens of this call."""
        attention_mask = as_tensor(attention_mask, self.device)
        return None if attention_mask is None else attention_mask[:, -tokens:]


def _with_rows_of(old: nn.Module, new: nn.Module) -> nn.Module:
    new = new.to(old.weight.device, old.weight.dtype)
    rows = min(len(old.weight), len(new.weight))
    with torch.no_grad():
        new.weight[:rows] = old.weight[:rows]
    return new.requires_grad_(old.weight.requires_grad)


class OPTModel(OPTPreTrainedModel):
    """The decoder without a head."""

    task = "base"

    def __init__(self, config: OPTConfig, *, attn_implementation: str = "sdpa"):
        super().__init__(config, attn_implementation=attn_implementation)
        self.decoder = Decoder(config, attn_implementation)

    @property
    def base_model(self) -> "OPTModel":
        return self

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **unknown,
    ) -> BaseModelOutput:
        """Hidden states [B, T, E] of `input_ids` [B, T] or `inputs_embeds` [B, T, E].

        Args:
            attention_mask: [B, T], 1 for real tokens; with a cache, all columns so far may be given.
            position_ids: [B, T] or [1, T], from 0; by default the number of real tokens before each.
            past_key_values: a cache to continue; it is written in place.

        Raises:
            InputError: lists every argument that is out of range or of the wrong shape.
        """
        return self.decode(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            past_key_values,
            use_cache,
            output_attentions,
            output_hidden_states,
            unknown,
        )


class OPTForCausalLM(GenerationMixin, OPTPreTrainedModel):
    """The language model: next-token logits from the word embeddings, or from `lm_head` where it is not tied."""

    task = "causal-lm"

    def __init__(self, config: OPTConfig, *, attn_implementation: str = "sdpa"):
        super().__init__(config, attn_implementation=attn_implementation)
        self.model = OPTModel(config, attn_implementation=attn_implementation)
        self.lm_head = Linear(config.word_embed_proj_dim, config.vocab_size, bias=False, init_std=config.init_std)
        self.tie_weights()

    def get_output_embeddings(self) -> Linear:
        return self.lm_head

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.get_input_embeddings().weight

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        **unknown,
    ) -> CausalLMOutput:
        """Logits [B, T, V], or of the last `logits_to_keep` tokens; the loss where `labels` [B, T] are given.

        Token t predicts label t + 1; labels of -100 and predictions made at padding are not counted.
        """
        out = self.decode(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            past_key_values,
            use_cache,
            output_attentions,
            output_hidden_states,
            unknown,
            logits_to_keep,
        )
        hidden_BTE = out.last_hidden_state
        labels = as_index(labels, self.device)
        if labels is not None:
            check_labels("labels", known(labels), hidden_BTE.shape[:2], self.config.vocab_size)
        if logits_to_keep and labels is None:
            hidden_BTE = hidden_BTE[:, -logits_to_keep:]
        logits_BTV = self.lm_head(hidden_BTE)
        loss = None
        if labels is not None:
            mask_BT = self.current_mask(attention_mask, hidden_BTE.shape[1])
            loss = losses.causal_lm_loss(logits_BTV, labels, mask_BT)
            logits_BTV = logits_BTV[:, -logits_to_keep:]
        return CausalLMOutput(loss, logits_BTV, out.past_key_values, out.hidden_states, out.attentions)


class OPTForSequenceClassification(OPTPreTrainedModel):
    """Label logits from the last real token of each row; regression, single- or multi-label by `problem_type`."""

    task = "sequence-classification"

    def __init__(self, config: OPTConfig, *, attn_implementation: str = "sdpa"):
        super().__init__(config, attn_implementation=attn_implementation)
        self.model = OPTModel(config, attn_implementation=attn_implementation)
        self.score = Linear(config.word_embed_proj_dim, config.num_labels, bias=False, init_std=config.init_std)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **unknown,
    ) -> SequenceClassifierOutput:
        """Logits [B, K]; the loss where `labels` are given: [B] classes, [B] or [B, K] numbers, or [B, K] of 0 and 1.

        The last real token is found by `attention_mask`, without one by `pad_token_id`.
        """
        out = self.decode(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            past_key_values,
            use_cache,
            output_attentions,
            output_hidden_states,
            unknown,
        )
        hidden_BTE = out.last_hidden_state
        mask_BT = self.current_mask(attention_mask, hidden_BTE.shape[1])
        if mask_BT is None and input_ids is not None and self.config.pad_token_id is not None:
            mask_BT = as_index(input_ids, self.device) != self.config.pad_token_id
        logits_BK = self.score(pool_last_token(hidden_BTE, mask_BT))
        loss = None
        if labels is not None:
            loss = self.loss(logits_BK, as_tensor(labels, self.device))
        return SequenceClassifierOutput(loss, logits_BK, out.past_key_values, out.hidden_states, out.attentions)

    def loss(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        (B, K), problem_type = logits_BK.shape, self.config.problem_type_of(known(labels, values=False).dtype)
        if problem_type == "single_label_classification":
            labels = as_index(labels.reshape(-1), self.device)
            check_labels("labels", known(labels), (B,), K)
        else:
            shape = (B,) if problem_type == "regression" and K == 1 and labels.ndim == 1 else (B, K)
            check_labels("labels", known(labels), shape, None)
        return losses.classification_loss(logits_BK, labels, problem_type)


class OPTForQuestionAnswering(OPTPreTrainedModel):
    """Logits for the first and the last token of an answer in the text."""

    task = "question-answering"

    def __init__(self, config: OPTConfig, *, attn_implementation: str = "sdpa"):
        super().__init__(config, attn_implementation=attn_implementation)
        self.model = OPTModel(config, attn_implementation=attn_implementation)
        self.qa_outputs = Linear(config.word_embed_proj_dim, 2, bias=True, init_std=config.init_std)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **unknown,
    ) -> QuestionAnsweringOutput:
        """Start and end logits [B, T]; the loss where `start_positions` and `end_positions` [B] are given.

        A position of -100, or one beyond the sequence (a truncated answer), is not counted.
        """
        out = self.decode(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            past_key_values,
            use_cache,
            output_attentions,
            output_hidden_states,
            unknown,
        )
        hidden_BTE = out.last_hidden_state
        mask_BT = self.current_mask(attention_mask, hidden_BTE.shape[1])
        logits_BT2 = self.qa_outputs(hidden_BTE)
        if mask_BT is not None:
            logits_BT2 = torch.where(mask_BT[..., None] != 0, logits_BT2, 0)
        start_BT, end_BT = logits_BT2.unbind(-1)
        loss = self.loss(start_BT, end_BT, start_positions, end_positions, mask_BT)
        return QuestionAnsweringOutput(loss, start_BT, end_BT, out.past_key_values, out.hidden_states, out.attentions)

    def loss(self, start_BT: Tensor, end_BT: Tensor, starts_B, ends_B, mask_BT: Tensor | None) -> Tensor | None:
        if starts_B is None and ends_B is None:
            return None
        if starts_B is None or ends_B is None:
            raise InputError("invalid arguments", ["start_positions, end_positions: expected both or neither, got one"])
        starts_B, ends_B = as_index(starts_B, self.device).reshape(-1), as_index(ends_B, self.device).reshape(-1)
        for name, positions_B in (("start_positions", starts_B), ("end_positions", ends_B)):
            check_labels(name, known(positions_B), start_BT.shape[:1], torch.iinfo(torch.int64).max)
        return losses.question_answering_loss(start_BT, end_BT, starts_B, ends_B, mask_BT)


def pool_last_token(hidden_BTE: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The hidden state [B, E] of the last real token of each row; zero for a row without one."""
    if mask_BT is None:
        return hidden_BTE[:, -1]
    columns_BT = torch.arange(hidden_BTE.shape[1], device=hidden_BTE.device) * (mask_BT != 0)
    pooled_BE = torch.take_along_dim(hidden_BTE, columns_BT.argmax(1)[:, None, None], 1)[:, 0]
    return torch.where((mask_BT != 0).any(1, keepdim=True), pooled_BE, 0)
