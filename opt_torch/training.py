"""Training steps, PyTorch: gradients, AdamW, and a state on disk with which any backend goes on.

Batches are the business of `opt_core.batching`, the loop around the steps that of `opt_zoo.training_loop`.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from conversion.training_state import read_training_state, write_training_state
from opt_core.errors import InputError, TrainingError
from opt_core.optimization import Moments, TrainingRecipe
from opt_core.reference import IGNORED_LABEL
from opt_torch import losses
from opt_torch.inputs import as_tensor
from opt_torch.loading import from_numpy, to_numpy
from opt_torch.lora import load_adapter, save_adapter
from opt_torch.optimization import gradient_norm, make_optimizer, name_of


class Trainer:
    """Changes a model step by step, by a recipe.

    Args:
        model: any of the three classes with a loss; with adapters (`opt_torch.lora`), these alone are trained.
        seed: of dropout and LayerDrop, which depend on it and the number of the step alone: a run that was interrupted
            goes on as if it had not been.
        accumulate: parts in which a batch is computed, one after another, to save memory.
    """

    def __init__(self, model, recipe: TrainingRecipe | None = None, *, seed: int = 0, accumulate: int = 1):
        self.model, self.recipe = model, recipe or TrainingRecipe()
        self.seed, self.accumulate = seed, accumulate
        self.optimizer, _ = make_optimizer(model, self.recipe)  # without the schedule: `step_count` is all it knows
        self.parameters = {name_of(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.step_count = 0
        self.gradient_norm = math.nan

    def step(self, batch: Mapping[str, np.ndarray]) -> float:
        """Takes one step; returns the loss before it. `gradient_norm` is that of before clipping.

        Args:
            batch: arguments of the model's call, with labels.

        Raises:
            InputError: lists what is wrong with the batch.
            TrainingError: the loss or the gradient is not finite; weights and moments stay as they were.
        """
        self.model.train()
        self.optimizer.zero_grad()
        loss = self._backward(batch)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = gradient_norm(gradients)
        self.gradient_norm = float(norm)
        if not math.isfinite(loss) or not math.isfinite(self.gradient_norm):
            problem = f"expected finite numbers, got a loss of {loss} and a gradient norm of {self.gradient_norm}"
            raise TrainingError(f"step {self.step_count}", [problem])
        if self.recipe.max_gradient_norm is not None:
            clip_grads_with_norm_(self.parameters.values(), self.recipe.max_gradient_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.recipe.learning_rate_at(self.step_count))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_count += 1
        return loss

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, np.ndarray]) -> float:
        """The loss of a batch, without dropout."""
        return float(self.model.eval()(**batch, **self._options).loss)

    @torch.no_grad()
    def predict(self, batch: Mapping[str, np.ndarray]):
        """The outputs for a batch, without dropout."""
        return self.model.eval()(**batch, use_cache=False)

    def save(self, folder) -> None:
        """Writes the weights (of a model with adapters, these alone) and the training state, for any backend."""
        if self.model.lora is None:
            self.model.save_pretrained(folder)
        else:
            save_adapter(self.model, folder)
        moments = {name: Moments(*map(to_numpy, self._moments(p))) for name, p in self.parameters.items()}
        write_training_state(folder, self.step_count, self.seed, self.recipe, moments)

    @torch.no_grad()
    def restore(self, folder) -> None:
        """Reads what `save` of any backend wrote: weights, moments, seed and number of steps are then as there.

        Raises:
            CheckpointError: everything wrong with the files, or that is not of this model.
        """
        state = read_training_state(folder, {name: tuple(p.shape) for name, p in self.parameters.items()})
        if self.model.lora is None:
            loaded = type(self.model).from_pretrained(folder, config=self.model.config, dtype=self.model.dtype)
            for mine, stored in zip(self.model.parameters(), loaded.parameters(), strict=True):
                mine.copy_(stored)
        else:
            load_adapter(self.model, folder)
        for name, parameter in self.parameters.items():
            for mine, stored in zip(self._moments(parameter), state.moments[name], strict=True):
                mine.copy_(from_numpy(np.asarray(stored)))
            self.optimizer.state[parameter]["step"].fill_(state.step)
        self.step_count, self.seed = state.step, state.seed

    def _backward(self, batch: Mapping[str, np.ndarray]) -> float:
        """Leaves the gradients in the parameters; returns the loss."""
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        loss = 0.0
        with torch.random.fork_rng(devices):
            for number, (part, share) in enumerate(self._parts(batch)):
                torch.manual_seed(_mixed(self.seed, self.step_count, number))
                part_loss = self.model(**part, **self._options).loss * share
                part_loss.backward()
                loss += float(part_loss.detach())
        return loss

    def _parts(self, batch: Mapping[str, np.ndarray]) -> list[tuple[dict[str, Tensor], Tensor | float]]:
        """The batch in parts, each with its share of the predictions that count."""
        batch = {name: as_tensor(x, self.model.device) for name, x in batch.items()}
        if self.accumulate == 1:
            return [(batch, 1.0)]
        rows = {len(x) for x in batch.values()}
        if any(number % self.accumulate for number in rows):
            raise InputError("batch", [f"expected rows in {self.accumulate} equal parts (accumulate), got {max(rows)}"])
        columns = (x.chunk(self.accumulate) for x in batch.values())
        parts = [dict(zip(batch, part, strict=True)) for part in zip(*columns, strict=True)]
        counts = torch.tensor([float(_predictions(part)) for part in parts])
        return list(zip(parts, (counts / counts.sum().clamp(min=1)).tolist(), strict=True))

    def _moments(self, parameter: nn.Parameter) -> Moments:
        """Those of a parameter; zeros, which the optimizer goes on with, before its first step."""
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state.update({kind: torch.zeros_like(parameter) for kind in Moments._fields})
        return Moments(*(state[kind] for kind in Moments._fields))

    @property
    def _options(self) -> dict[str, int]:
        """What spares the outputs that a step does not need."""
        return dict(use_cache=False, **({"logits_to_keep": 1} if self.model.task == "causal-lm" else {}))


def _mixed(*numbers: int) -> int:
    """A seed of PyTorch's that depends on all of them."""
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)[0])


def _predictions(batch: Mapping[str, Tensor]) -> Tensor | int:
    """How many targets of a language model count; of another task, the rows."""
    labels = batch.get("labels")
    if labels is None or "input_ids" not in batch or labels.shape != batch["input_ids"].shape:
        return len(next(iter(batch.values())))
    targets_BT = losses.causal_lm_targets(labels, batch.get("attention_mask"), batch.get("segment_ids"))
    return (targets_BT != IGNORED_LABEL).sum()
