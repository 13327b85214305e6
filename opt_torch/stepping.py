"""A model and its cache behind the calls that every search makes (`opt_core.stepper`), PyTorch."""

import numpy as np
import torch
from torch import Tensor

from opt_core.generation import bucketed
from opt_core.stepper import StepOutput
from opt_torch.cache import reorder, with_capacity


class ModelStepper:
    """Steps a causal language model in evaluation mode; one at a time, since the cache is its own."""

    def __init__(self, model):
        self.model, self.cache = model, None

    @torch.no_grad()
    def prefill(
        self, input_ids_RT: np.ndarray, real_RT: np.ndarray, capacity: int, *, output_hidden: bool = False
    ) -> StepOutput:
        ids_RT, real_RT = (torch.as_tensor(x, device=self.model.device) for x in (input_ids_RT, real_RT))
        logits_RV, hidden_RTE, cache = self.model.feed(ids_RT, None if real_RT.all() else real_RT, real_BT=real_RT)
        self.cache = with_capacity(cache, bucketed(max(capacity, ids_RT.shape[1])))
        return _as_numpy(logits_RV, hidden_RTE if output_hidden else None)

    @torch.no_grad()
    def step(self, tokens_RT: np.ndarray, *, output_hidden: bool = False) -> StepOutput:
        ids_RT = torch.as_tensor(tokens_RT, device=self.model.device)
        logits_RTV, hidden_RTE, self.cache = self.model.feed(ids_RT, cache=self.cache)
        return _as_numpy(logits_RTV, hidden_RTE if output_hidden else None)

    def reorder(self, rows_Q: np.ndarray) -> None:
        self.cache = reorder(self.cache, torch.as_tensor(rows_Q, device=self.model.device))

    def truncate(self, lengths_R: np.ndarray) -> None:
        self.cache = self.cache._replace(lengths=torch.as_tensor(lengths_R, device=self.model.device))


def _as_numpy(logits: Tensor, hidden: Tensor | None) -> StepOutput:
    logits, hidden = (None if x is None else x.float().cpu().numpy() for x in (logits, hidden))
    return StepOutput(logits, hidden)
