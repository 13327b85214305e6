"""Greedy generation, PyTorch: one prefill, then one step per token on a preallocated cache."""

import numpy as np
import torch
from torch import Tensor

from opt_core.generation import GenerationPlan, plan_generation
from opt_torch.cache import Cache, with_capacity
from opt_torch.inputs import as_index, as_tensor, known
from opt_torch.packing import pool_last_token


class GenerationMixin:
    """`generate` for a model with a decoder and a head."""

    @torch.no_grad()
    def generate(self, input_ids=None, attention_mask=None, max_new_tokens: int | None = None, **options) -> Tensor:
        """Continues each row of `input_ids` [B, T] greedily; returns [B, T + n] token ids, prompt and padding included.

        Rows end at an `eos_token_id` and hold `pad_token_id` after it; n is the longest of them. Dropout is off.

        Args:
            attention_mask: [B, T], 1 for real tokens; without it tokens equal to `pad_token_id` are padding.
            max_new_tokens: at most that many; 20 if neither it nor `max_length` (which counts the prompt) is given.
            options: `max_length`, `eos_token_id` (one or several), `pad_token_id`.

        Raises:
            InputError: before anything is computed; also when the text would outgrow `max_position_embeddings`.
        """
        plan = plan_generation(
            self.config,
            known(as_index(input_ids, self.device)),
            known(as_tensor(attention_mask, self.device)),
            max_new_tokens=max_new_tokens,
            **options,
        )
        was_training = self.training
        self.eval()
        try:
            new_Bn = self._search(plan)
        finally:
            self.train(was_training)
        return torch.cat([torch.as_tensor(plan.input_ids, device=self.device), new_Bn], dim=1)

    def _search(self, plan: GenerationPlan) -> Tensor:
        eos = torch.tensor(plan.eos_token_ids, device=self.device)
        logits_BV, cache = self.prefill(plan.input_ids, plan.real, plan.capacity)
        ended_B = torch.zeros(len(logits_BV), dtype=torch.bool, device=self.device)
        tokens = []
        while True:
            token_B = torch.where(ended_B, plan.pad_token_id, logits_BV.argmax(-1))
            tokens.append(token_B)
            ended_B = ended_B | torch.isin(token_B, eos)
            if len(tokens) == plan.max_new_tokens or ended_B.all():
                return torch.stack(tokens, dim=1)
            logits_BV, cache = self.decode_step(token_B, cache)

    def prefill(self, input_ids_BT: np.ndarray, real_BT: np.ndarray, capacity: int) -> tuple[Tensor, Cache]:
        """Runs the prompt; returns the logits [B, V] after the last real token of each row, and its cache."""
        ids_BT, real_BT = (torch.as_tensor(x, device=self.device) for x in (input_ids_BT, real_BT))
        mask_BT = None if real_BT.all() else real_BT
        out = self.base_model.decoder(ids_BT, mask_BT, use_cache=True)
        last_BE = pool_last_token(out.last_hidden_state, real_BT)
        return self.logits(last_BE), with_capacity(out.past_key_values, capacity)

    def decode_step(self, token_B: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Feeds one token a row; returns the logits [B, V] after it, and the cache with it."""
        out = self.base_model.decoder(token_B[:, None], past_key_values=cache, use_cache=True)
        return self.logits(out.last_hidden_state[:, 0]), out.past_key_values
