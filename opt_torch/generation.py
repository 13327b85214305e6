"""Generation, PyTorch: one prefill, then one step per token on a preallocated cache, on a GPU recorded as one graph.

Greedy search is here; every other strategy is `opt_core.searching`, given the steps of `opt_torch.stepping`.
"""

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from opt_core.generation import GenerationPlan
from opt_core.generation_config import GenerationConfig
from opt_core.generation_output import GenerateOutput, as_arrays
from opt_core.generation_request import GenerationRequest, call_options, plan_request
from opt_core.searching import search, stream
from opt_torch.cache import Cache, with_capacity
from opt_torch.cuda_graph import recorded_step
from opt_torch.inputs import as_index, as_tensor, known
from opt_torch.packing import pool_last_token
from opt_torch.stepping import ModelStepper


class GenerationMixin:
    """`generate` for a model with a decoder and a head."""

    generation_config: GenerationConfig  # that of the checkpoint, or what it was set to

    @torch.no_grad()
    def generate(
        self,
        input_ids=None,
        attention_mask=None,
        max_new_tokens: int | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        assistant_model: "GenerationMixin | None" = None,
        **options,
    ) -> Tensor | GenerateOutput:
        """Continues each row of `input_ids` [B, T]; returns [R, T + n] token ids, prompt and padding included.

        Greedy unless options say otherwise, which `opt_core.generation_config.GenerationConfig` lists: sampling, beams,
        contrastive and assisted search, rules for logits, ways to stop. R is B times `num_return_sequences`. Rows end
        at an `eos_token_id` and hold `pad_token_id` after it; n is the longest of them. Dropout is off.

        Args:
            attention_mask: [B, T], 1 for real tokens; without it tokens equal to `pad_token_id` are padding.
            max_new_tokens: at most that many; 20 if neither it nor `max_length` (which counts the prompt) is given.
            generation_config: instead of the model's own, which came with its checkpoint; options override it.
            assistant_model: a smaller model of the same vocabulary, which drafts tokens for this one to verify.
            options: also `seed` (the same text in every framework) or `generator` (NumPy's), `logits_processor`,
                `stopping_criteria`, `prefix_allowed_tokens_fn`, `tokenizer` for stop strings, `streamer`.

        Returns:
            With `return_dict_in_generate` an `opt_core.generation_output.GenerateOutput`.

        Raises:
            InputError: before anything is computed; also when the text would outgrow `max_position_embeddings`.
        """
        request = self._request(input_ids, attention_mask, generation_config, assistant_model, max_new_tokens, options)
        models = [model for model in (self, assistant_model) if model is not None]
        with _evaluating(models):
            if request.is_plain:
                return torch.cat(
                    [torch.as_tensor(request.plan.input_ids, device=self.device), self._search(request.plan)], dim=1
                )
            out = search(request, *map(ModelStepper, models))
        out = as_arrays(out, lambda x: torch.as_tensor(x, device=self.device))
        return out if request.settings.return_dict_in_generate else out.sequences

    def stream(
        self,
        input_ids=None,
        attention_mask=None,
        max_new_tokens: int | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        assistant_model: "GenerationMixin | None" = None,
        **options,
    ) -> Iterator[np.ndarray]:
        """The new tokens [R] int64 of each step of `generate`, as soon as they are known; arguments are as there.

        `opt_core.streaming.words` makes text of them. Rows that have ended give `pad_token_id`.

        Raises:
            InputError: at once, as `generate`; also for beam search, which does not know its text before the end.
        """
        request = self._request(input_ids, attention_mask, generation_config, assistant_model, max_new_tokens, options)
        models = [model for model in (self, assistant_model) if model is not None]
        with _evaluating(models):
            tokens = stream(request, *map(ModelStepper, models))
        return _streamed(tokens, models)

    def prepare_inputs_for_generation(self, input_ids, **inputs) -> dict:
        """The arguments as they are: PEFT asks for this method, `generate` does not."""
        return {"input_ids": input_ids, **inputs}

    def _request(
        self, input_ids, attention_mask, generation_config, assistant_model, max_new_tokens, options
    ) -> GenerationRequest:
        def plan() -> GenerationRequest:
            return plan_request(
                self.config,
                known(as_index(input_ids, self.device)),
                known(as_tensor(attention_mask, self.device)),
                generation_config or self.generation_config,
                **call_options(options, max_new_tokens, assistant_model, GenerationMixin),
            )

        if self.device_mesh is None:
            return plan()
        from opt_torch.agreement import agreed_request

        return agreed_request(plan, is_seeded=options.get("seed") is not None or options.get("generator") is not None)

    def _search(self, plan: GenerationPlan) -> Tensor:
        eos = torch.tensor(plan.eos_token_ids, device=self.device)
        logits_BV, cache = self.prefill(plan.input_ids, plan.real, plan.capacity)
        ended_B = torch.zeros(len(logits_BV), dtype=torch.bool, device=self.device)
        step = self.decode_step
        stays = self.device_mesh is None and self.offloaded is None  # where the weights are now
        if stays and _records_steps(self.device) and plan.max_new_tokens > 1:
            step = recorded_step(self, cache)
            cache = step.cache
        tokens = []
        while True:
            token_B = torch.where(ended_B, plan.pad_token_id, logits_BV.argmax(-1))
            tokens.append(token_B)
            ended_B = ended_B | torch.isin(token_B, eos)
            if len(tokens) == plan.max_new_tokens or (plan.eos_token_ids and ended_B.all()):  # which waits for a GPU
                return torch.stack(tokens, dim=1)
            logits_BV, cache = step(token_B, cache)

    def prefill(self, input_ids_BT: np.ndarray, real_BT: np.ndarray, capacity: int) -> tuple[Tensor, Cache]:
        """Runs the prompt; returns the logits [B, V] after the last real token of each row, and its cache."""
        ids_BT, real_BT = (torch.as_tensor(x, device=self.device) for x in (input_ids_BT, real_BT))
        mask_BT = None if real_BT.all() else real_BT
        logits_BV, _, cache = self.feed(ids_BT, mask_BT, real_BT=real_BT)
        return logits_BV, with_capacity(cache, capacity)

    def decode_step(self, token_B: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Feeds one token a row; returns the logits [B, V] after it, and the cache with it."""
        logits_B1V, _, cache = self.feed(token_B[:, None], cache=cache)
        return logits_B1V[:, 0], cache

    def feed(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None = None,
        cache: Cache | None = None,
        *,
        real_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Cache]:
        """Runs tokens behind those of a cache; arguments are not checked.

        Returns the logits [B, T, V], or of `real_BT` the last alone, [B, V]; hidden states [B, T, E]; and the cache.
        """
        out = self.base_model.decoder(ids_BT, mask_BT, past_key_values=cache, use_cache=True)
        hidden_BTE = out.last_hidden_state
        wanted = hidden_BTE if real_BT is None else pool_last_token(hidden_BTE, real_BT)
        return self.logits(wanted), hidden_BTE, out.past_key_values


def _records_steps(device: torch.device) -> bool:
    """Whether greedy search records its steps as a CUDA graph; OPT_TORCH_CUDA_GRAPHS=0 turns that off."""
    return device.type == "cuda" and os.environ.get("OPT_TORCH_CUDA_GRAPHS", "1") != "0"


def _streamed(tokens: Iterator[np.ndarray], models: list) -> Iterator[np.ndarray]:
    with _evaluating(models):
        yield from tokens


@contextlib.contextmanager
def _evaluating(models: list) -> Iterator[None]:
    """Without dropout; models that were in training mode are in it again afterwards."""
    in_training = [model for model in models if model.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model in in_training:
            model.train()
