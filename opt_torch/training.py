"""Training steps, PyTorch: gradients, AdamW, and a state on disk with which any backend goes on.

Batches are the business of `opt_core.batching`, the loop around the steps that of `opt_zoo.training_loop`. Of a sharded
model (`opt_torch.sharding`) every process calls the same methods with the same batch, and gets the same numbers.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from conversion.checkpoint import open_checkpoint
from conversion.parameters import read_parameters
from conversion.training_state import read_training_state, write_training_state
from opt_core.checks import check_accumulate
from opt_core.errors import InputError, TrainingError
from opt_core.optimization import Moments, TrainingRecipe
from opt_core.schema import shapes
from opt_torch import losses
from opt_torch.inputs import as_tensor
from opt_torch.loading import from_numpy, to_numpy
from opt_torch.lora import load_adapter, save_adapter
from opt_torch.optimization import gradient_norm, make_optimizer, name_of
from opt_torch.processes import other_processes, part_of_batch, sum_of_parts, whole_rows
from opt_torch.sharding import as_part, own_slices, slices_of, write_from_first


class Trainer:
    """Changes a model step by step, by a recipe.

    Args:
        model: any of the three classes with a loss; with adapters (`opt_torch.lora`), these alone are trained.
        seed: of dropout and LayerDrop, which depend on it and the number of the step alone: a run that was interrupted
            goes on as if it had not been. Processes that have other rows of a batch lose other values.
        accumulate: parts in which a batch, or what a process has of it, is computed, one after another, to save memory.
    """

    def __init__(self, model, recipe: TrainingRecipe | None = None, *, seed: int = 0, accumulate: int = 1):
        check_accumulate(accumulate)
        self.model, self.recipe = model, recipe or TrainingRecipe()
        self.seed, self.accumulate = seed, accumulate
        self.optimizer, _ = make_optimizer(model, self.recipe)  # without the schedule: `step_count` is all it knows
        self.parameters = {name_of(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.part, self.parts = part_of_batch(model)
        self.step_count = 0
        self.gradient_norm = math.nan

    def step(self, batch: Mapping[str, np.ndarray]) -> float:
        """Takes one step; returns the loss before it. `gradient_norm` is that of before clipping.

        Args:
            batch: arguments of the model's call, with labels; the whole batch on every process.

        Raises:
            InputError: lists what is wrong with the batch.
            TrainingError: the loss or the gradient is not finite; weights and moments stay as they were. Or another
                process is gone, and with it this one's part of the weights.
        """
        self.model.train()
        self.optimizer.zero_grad()
        with self._others():
            loss = self._backward(batch)
            norm = gradient_norm(p.grad for p in self.parameters.values() if p.grad is not None)
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
        ((part, shares),) = self._parts(batch, 1)
        with self._others():
            out = self.model.eval()(**part, **self._options)
            return sum_of_parts(self.model, float(losses.part_of_loss(out, part, shares)))

    @torch.no_grad()
    def predict(self, batch: Mapping[str, np.ndarray]):
        """The outputs for a batch, without dropout; on every process those of all rows."""
        ((part, shares),) = self._parts(batch, 1)
        with self._others():
            out = self.model.eval()(**part, use_cache=False)
            loss = out.loss
            if loss is not None:
                loss = loss.new_tensor(sum_of_parts(self.model, float(losses.part_of_loss(out, part, shares))))
            rows = {name: whole_rows(self.model, x) for name, x in out._asdict().items() if name != "loss"}
        return type(out)(loss=loss, **rows)

    def save(self, folder) -> None:
        """Writes the weights (of a model with adapters, these alone) and the training state, for any backend.

        Every process has to call it; the first writes, and at no time is more than one tensor whole.
        """
        with self._others():
            if self.model.lora is None:
                self.model.save_pretrained(folder)
            else:
                save_adapter(self.model, folder)
            self._save_state(folder)

    @torch.no_grad()
    def restore(self, folder) -> None:
        """Reads what `save` of any backend wrote: weights, moments, seed and number of steps are then as there.

        Each process reads its own parts, of files that any number of processes wrote.

        Raises:
            CheckpointError: everything wrong with the files, or that is not of this model.
        """
        state = read_training_state(folder, {name: tuple(p.shape) for name, p in self.parameters.items()})
        if self.model.lora is None:
            self._read_weights(folder)
        else:
            load_adapter(self.model, folder)
        for name, parameter in self.parameters.items():
            stored = state.read_slice(name, slices_of(parameter))
            for mine, array in zip(self._moments(parameter), stored, strict=True):
                mine.copy_(as_part(from_numpy(array).to(mine.device), mine))
        self.go_on_at(state.step, state.seed)

    @property
    def process_index(self) -> int:
        """Which of the processes that train this model this is; 0 for one alone."""
        return 0 if self.model.mesh is None else dist.get_rank()

    def agree(self, number: int) -> int:
        """The number that process 0 gave, on every process; all have to call it."""
        if self.model.mesh is None:
            return number
        agreed = torch.tensor(number if self.process_index == 0 else 0, device=self.model.device)
        with self._others():
            dist.all_reduce(agreed)
            return int(agreed)

    def wait_for_all(self) -> None:
        """Returns once every process has called it."""
        self.agree(0)

    def moments(self) -> dict[str, Moments]:
        """Of every parameter, this process' parts of them; zeros before the first step."""
        return {name: self._moments(parameter) for name, parameter in self.parameters.items()}

    def go_on_at(self, step: int, seed: int) -> None:
        """Makes `step` the number of steps done, for weights and moments that are set from outside."""
        self.step_count, self.seed = step, seed
        for parameter in self.parameters.values():
            self._moments(parameter)
            self.optimizer.state[parameter]["step"].fill_(step)

    def _others(self):
        return other_processes(self.model, self.step_count)

    def _backward(self, batch: Mapping[str, np.ndarray]) -> float:
        """Leaves the gradients in the parameters; returns the loss."""
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        loss = 0.0
        with torch.random.fork_rng(devices):
            for number, (part, shares) in enumerate(self._parts(batch, self.accumulate)):
                torch.manual_seed(_mixed(self.seed, self.step_count, number, self.part))
                part_loss = losses.part_of_loss(self.model(**part, **self._options), part, shares)
                (part_loss * self.parts).backward()  # the engine takes the mean over the processes
                loss += float(part_loss.detach())
        return sum_of_parts(self.model, loss)

    def _parts(self, batch: Mapping[str, np.ndarray], accumulate: int) -> list[tuple[dict[str, Tensor], list[float]]]:
        """The rows of this process in parts, each with its shares of the targets that count in the whole batch."""
        batch = {name: as_tensor(x, self.model.device) for name, x in batch.items()}
        number = accumulate * self.parts
        if number == 1:
            return [(batch, [1.0])]
        rows = {len(x) for x in batch.values()}
        if any(count % number for count in rows):
            of_what = "accumulate" if self.parts == 1 else f"accumulate x {self.parts} processes"
            raise InputError("batch", [f"expected rows in {number} equal parts ({of_what}), got {max(rows)}"])
        columns = (x.chunk(number) for x in batch.values())
        parts = [dict(zip(batch, part, strict=True)) for part in zip(*columns, strict=True)]
        of_model = self.model.task, self.model.config
        counts = torch.tensor([losses.counted_targets(part, *of_model) for part in parts], dtype=torch.float64)
        shares = (counts / counts.sum(0).clamp(min=1)).tolist()
        return list(zip(parts, shares, strict=True))[self.part * accumulate :][:accumulate]

    def _read_weights(self, folder) -> None:
        model, dtype = self.model, str(self.model.dtype).removeprefix("torch.")
        with open_checkpoint(folder, config=model.config) as checkpoint:
            checkpoint.check(model.config, model.task)
            names = shapes(model.config, model.task)
            for name, array in read_parameters(checkpoint, names, dtype, slices=own_slices(model)):
                mine = model.weight(name)
                mine.copy_(as_part(from_numpy(array).to(mine.device), mine))

    def _save_state(self, folder) -> None:
        def write(whole: Callable[[str], Tensor]) -> None:
            moments = {
                name: Moments(*(_Whole(f"{kind}.{name}", tuple(p.shape), whole) for kind in Moments._fields))
                for name, p in self.parameters.items()
            }
            write_training_state(folder, self.step_count, self.seed, self.recipe, moments)

        if self.model.mesh is None:
            write(self._moment)
        else:
            write_from_first(self._moment, write)

    def _moment(self, name: str) -> Tensor:
        """That of a name as in the files, `exp_avg.decoder.layers.0.fc1.weight`."""
        kind, _, parameter = name.partition(".")
        return getattr(self._moments(self.parameters[parameter]), kind)

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


class _Whole(NamedTuple):
    """A moment that is gathered when its array is asked for."""

    name: str
    shape: tuple[int, ...]
    gather: Callable[[str], Tensor]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return to_numpy(self.gather(self.name))


def _mixed(*numbers: int) -> int:
    """A seed of PyTorch's that depends on all of them."""
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)[0])
