"""A model and its cache behind the calls that every search makes (`opt_core.stepper`), PyTorch."""

import numpy as np
import torch
from torch import Tensor

from opt_core.generation import bucketed
from opt_core.stepper import StepOutput
from opt_torch.cache import reorder, with_capacity
from opt_torch.packing import pool_last_token


class ModelStepper:
    """Steps a causal language model in evaluation mode; one at a time, since the cache is its own."""

    def __init__(self, model):
        self.model, self.cache = model, None

    @torch.no_grad()
    def prefill(
        self, input_ids_RT: np.ndarray, real_RT: np.ndarray, capacity: int, *, output_hidden: bool = False
    ) -> StepOutput:
        ids_RT, real_RT = (torch.as_tensor(x, device=self.model.device) for x in (input_ids_RT, real_RT))
        out = self.model.base_model.decoder(ids_RT, None if real_RT.all() else real_RT, use_cache=True)
        self.cache = with_capacity(out.past_key_values, bucketed(max(capacity, ids_RT.shape[1])))
        logits_RV = self.model.logits(pool_last_token(out.last_hidden_state, real_RT))
        return _as_numpy(logits_RV, out.last_hidden_state if output_hidden else None)

    @torch.no_grad()
    def step(self, tokens_RT: np.ndarray, *, output_hidden: bool = False) -> StepOutput:
        ids_RT = torch.as_tensor(tokens_RT, device=self.model.device)
        out = self.model.base_model.decoder(ids_RT, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        logits_RTV = self.model.logits(out.last_hidden_state)
        return _as_numpy(logits_RTV, out.last_hidden_state if output_hidden else None)

    def reorder(self, rows_Q: np.ndarray) -> None:
        self.cache = reorder(self.cache, torch.as_tensor(rows_Q, device=self.model.device))

    def truncate(self, lengths_R: np.ndarray) -> None:
        self.cache = self.cache._replace(lengths=torch.as_tensor(lengths_R, device=self.model.device))


def _as_numpy(logits: Tensor, hidden: Tensor | None) -> StepOutput:
    logits, hidden = (None if x is None else x.float().cpu().numpy() for x in (logits, hidden))
    return StepOutput(logits, hidden)
