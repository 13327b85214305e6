"""The published classes, PyTorch: base model, causal language model, sequence classification, question answering."""

import torch
from torch import Tensor, nn

from opt_core.checks import check_labels
from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.generation_config import GenerationConfig
from opt_core.outputs import BaseModelOutput, CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput
from opt_torch import losses
from opt_torch.cache import Cache
from opt_torch.decoder import Decoder
from opt_torch.generation import GenerationMixin
from opt_torch.inputs import as_index, as_tensor, known
from opt_torch.layers import Linear
from opt_torch.linear_cross_entropy import linear_cross_entropy
from opt_torch.packing import pool_last_token
from opt_torch.pretrained import OPTPreTrainedModel


class OPTModel(OPTPreTrainedModel):
    """The decoder without a head."""

    task = "base"

    def __init__(self, config: OPTConfig, *, attn_implementation: str = "sdpa"):
        super().__init__(config, attn_implementation=attn_implementation)
        self.decoder = Decoder(config, attn_implementation)

    @property
    def base_model(self) -> OPTPreTrainedModel:
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
        segment_ids=None,
        head_mask=None,
        **unknown,
    ) -> BaseModelOutput:
        """Hidden states [B, T, E] of `input_ids` [B, T] or `inputs_embeds` [B, T, E].

        Args:
            attention_mask: [B, T], 1 for real tokens; with a cache, all columns so far may be given.
            position_ids: [B, T] or [1, T], from 0; by default the number of real tokens before each.
            past_key_values: a cache to continue; it is written in place.
            segment_ids: [B, T], several documents in a row: tokens see those of the same run of ids, and positions
                count from its beginning.
            head_mask: [L, N], or [N] for all layers: what the output of each head is multiplied with.

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
            segment_ids=segment_ids,
            head_mask=head_mask,
        )


class OPTForCausalLM(GenerationMixin, OPTPreTrainedModel):
    """The language model: next-token logits from the word embeddings, or from `lm_head` where it is not tied."""

    task = "causal-lm"

    def __init__(self, config: OPTConfig, *, attn_implementation: str = "sdpa"):
        super().__init__(config, attn_implementation=attn_implementation)
        self.model = OPTModel(config, attn_implementation=attn_implementation)
        self.lm_head = Linear(config.word_embed_proj_dim, config.vocab_size, bias=False, init_std=config.init_std)
        self.tie_weights()
        self.generation_config = GenerationConfig()

    def get_output_embeddings(self) -> Linear:
        return self.lm_head

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.get_input_embeddings().weight

    def logits(self, hidden_BTE: Tensor) -> Tensor:
        """Next-token logits [..., V] of hidden states [..., E]."""
        return self.lm_head(hidden_BTE)

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
        segment_ids=None,
        head_mask=None,
        **unknown,
    ) -> CausalLMOutput:
        """Logits [B, T, V], or of the last `logits_to_keep` tokens; the loss where `labels` [B, T] are given.

        Token t predicts label t + 1; labels of -100 are not counted, nor predictions made at padding or, with
        `segment_ids` [B, T] (`OPTModel`), of another document.
        """
        labels = as_index(labels, self.device)
        known_labels = known(labels)  # read before the device is busy with the forward pass
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
            segment_ids,
            head_mask,
        )
        hidden_BTE = out.last_hidden_state
        loss = logits_BTV = None
        if labels is not None:
            check_labels("labels", known_labels, hidden_BTE.shape[:2], self.config.vocab_size)
            mask_BT = self.current_mask(attention_mask, hidden_BTE.shape[1])
            targets_BT = losses.causal_lm_targets(labels, mask_BT, as_index(segment_ids, self.device))
            loss, logits_BTV = self.task_loss(hidden_BTE, targets_BT, keep_logits=not logits_to_keep)
        if logits_BTV is None:
            logits_BTV = self.logits(hidden_BTE[:, -logits_to_keep:])
        return CausalLMOutput(loss, logits_BTV, out.past_key_values, out.hidden_states, out.attentions)

    def task_loss(
        self, hidden_BTE: Tensor, targets_BT: Tensor, *, keep_logits: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and where they are kept the logits [B, T, V]."""
        hidden_RE, weight_VE, part, kind = hidden_BTE.flatten(0, 1), self.lm_head.weight, None, Linear
        if self.head_parts > 1:
            from opt_torch.tensor_parallel import Head, vocabulary_part

            hidden_RE, weight_VE, part, kind = *vocabulary_part(hidden_RE, weight_VE), Head
        if not _is_plain(self.lm_head, kind):
            logits_BTV = self.logits(hidden_BTE)
            return losses.cross_entropy(logits_BTV, targets_BT), logits_BTV if keep_logits else None
        loss, logits_RV = linear_cross_entropy(hidden_RE, weight_VE, targets_BT.flatten(), keep_logits, part)
        if part is not None and logits_RV is not None:
            logits_RV = part.whole(logits_RV)
        return loss, None if logits_RV is None else logits_RV.view(*targets_BT.shape, -1)


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
        head_mask=None,
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
            head_mask=head_mask,
        )
        hidden_BTE = out.last_hidden_state
        mask_BT = self.current_mask(attention_mask, hidden_BTE.shape[1])
        if mask_BT is None and input_ids is not None and self.config.pad_token_id is not None:
            mask_BT = as_index(input_ids, self.device) != self.config.pad_token_id
        logits_BK = self.score(pool_last_token(hidden_BTE, mask_BT))
        loss = None
        if labels is not None:
            loss = self.task_loss(logits_BK, as_tensor(labels, self.device))
        return SequenceClassifierOutput(loss, logits_BK, out.past_key_values, out.hidden_states, out.attentions)

    def task_loss(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
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
        head_mask=None,
        **unknown,
    ) -> QuestionAnsweringOutput:
        """Start and end logits [B, T]; the loss where `start_positions` and `end_positions` [B] are given.

        A position of -100, one at padding, or one beyond the sequence (a truncated answer) is not counted.
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
            head_mask=head_mask,
        )
        hidden_BTE = out.last_hidden_state
        mask_BT = self.current_mask(attention_mask, hidden_BTE.shape[1])
        logits_BT2 = self.qa_outputs(hidden_BTE)
        if mask_BT is not None:
            logits_BT2 = torch.where(mask_BT[..., None] != 0, logits_BT2, 0)
        start_BT, end_BT = logits_BT2.unbind(-1)
        loss = self.task_loss(start_BT, end_BT, start_positions, end_positions, mask_BT)
        return QuestionAnsweringOutput(loss, start_BT, end_BT, out.past_key_values, out.hidden_states, out.attentions)

    def task_loss(self, start_BT: Tensor, end_BT: Tensor, starts_B, ends_B, mask_BT: Tensor | None) -> Tensor | None:
        if starts_B is None and ends_B is None:
            return None
        if starts_B is None or ends_B is None:
            raise InputError("invalid arguments", ["start_positions, end_positions: expected both or neither, got one"])
        starts_B, ends_B = as_index(starts_B, self.device).reshape(-1), as_index(ends_B, self.device).reshape(-1)
        for name, positions_B in (("start_positions", starts_B), ("end_positions", ends_B)):
            check_labels(name, known(positions_B), start_BT.shape[:1], torch.iinfo(torch.int64).max)
        return losses.question_answering_loss(start_BT, end_BT, starts_B, ends_B, mask_BT)


def _is_plain(module: nn.Module, kind: type = Linear) -> bool:
    """Whether the weight of this linear module says all: an adapter or a hook may compute more than `linear`."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    )
