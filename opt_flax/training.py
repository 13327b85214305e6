"""Training steps, Flax NNX: gradients, AdamW, and a state on disk with which any backend goes on.

Batches are the business of `opt_core.batching`, the loop around the steps that of `opt_zoo.training_loop`. A step is
two compiled functions, one for the gradients and one that writes new weights and moments over the old ones, so that
numbers which are not finite never reach them.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from conversion.training_state import read_training_state, write_training_state
from opt_core.checks import arguments_of, check_labels
from opt_core.errors import InputError, TrainingError
from opt_core.freed_memory import give_back_freed_memory
from opt_core.optimization import Moments, TrainingRecipe
from opt_core.reference import IGNORED_LABEL
from opt_flax import losses
from opt_flax.inputs import as_index, as_tensor, known
from opt_flax.loading import to_numpy
from opt_flax.lora import load_adapter, save_adapter
from opt_flax.optimization import gradient_norm, make_optimizer, name_of


class Trainer:
    """Changes a model step by step, by a recipe.

    A step overwrites the arrays of the model: who keeps some of them, or shares them with another model (`nnx.clone`),
    has to copy them before the next step. The first arrays are copied here.

    Args:
        model: any of the four classes; with adapters (`opt_flax.lora`), these alone are trained.
        seed: of dropout and LayerDrop, which depend on it and the number of the step alone: a run that was interrupted
            goes on as if it had not been.
        accumulate: parts in which a batch is computed, one after another, to save memory.
    """

    def __init__(self, model, recipe: TrainingRecipe | None = None, *, seed: int = 0, accumulate: int = 1):
        self.model, self.recipe = model, recipe or TrainingRecipe()
        self.seed, self.accumulate = seed, accumulate
        nnx.update(model, jax.tree.map(jnp.copy, nnx.state(model, model.trainable)))
        self.optimizer = make_optimizer(model, self.recipe)
        self.step_count = 0
        self.gradient_norm = math.nan

    def step(self, batch: Mapping[str, np.ndarray]) -> float:
        """Takes one step; returns the loss before it. `gradient_norm` is that of before clipping.

        Args:
            batch: arguments of the model's call, with labels.

        Raises:
            TrainingError: the loss or the gradient is not finite; weights and moments stay as they were.
        """
        batch = self._checked(batch)
        self.model.train()
        graphdef, trained, rest = nnx.split(self.model, self.model.trainable, ...)
        numbers = np.uint32([self.seed, self.step_count])
        loss, norm, gradients = _gradients(graphdef, trained, rest, batch, numbers, self.accumulate)
        loss, self.gradient_norm = float(loss), float(norm)
        give_back_freed_memory()
        if not math.isfinite(loss) or not math.isfinite(self.gradient_norm):
            problem = f"expected finite numbers, got a loss of {loss} and a gradient norm of {self.gradient_norm}"
            raise TrainingError(f"step {self.step_count}", [problem])
        optimizer, moments = nnx.split(self.optimizer)
        trained, moments = _update(graphdef, optimizer, trained, moments, rest, gradients)
        nnx.update(self.model, trained)
        nnx.update(self.optimizer, moments)
        self.step_count += 1
        return loss

    def evaluate(self, batch: Mapping[str, np.ndarray]) -> float:
        """The loss of a batch, without dropout."""
        self.model.eval()
        return float(_evaluate(*nnx.split(self.model), self._checked(batch)))

    def predict(self, batch: Mapping[str, np.ndarray]):
        """The outputs for a batch, without dropout."""
        self.model.eval()
        return _predict(*nnx.split(self.model), self._checked(batch))

    def save(self, folder) -> None:
        """Writes the weights (of a model with adapters, these alone) and the training state, for any backend."""
        if self.model.lora is None:
            self.model.save_pretrained(folder)
        else:
            save_adapter(self.model, folder)
        moments = _moments(nnx.state(self.optimizer))
        arrays = {name: Moments(*(to_numpy(x.get_value()) for x in pair)) for name, pair in moments.items()}
        write_training_state(folder, self.step_count, self.seed, self.recipe, arrays)

    def restore(self, folder) -> None:
        """Reads what `save` of any backend wrote: weights, moments, seed and number of steps are then as there.

        Raises:
            CheckpointError: everything wrong with the files, or that is not of this model.
        """
        optimizer = nnx.state(self.optimizer)
        moments = _moments(optimizer)
        state = read_training_state(folder, {name: pair.exp_avg.shape for name, pair in moments.items()})
        if self.model.lora is None:
            loaded = type(self.model).from_pretrained(folder, config=self.model.config, dtype=self.model.dtype)
            nnx.update(self.model, jax.tree.map(jnp.copy, nnx.state(loaded, nnx.Param)))
        else:
            load_adapter(self.model, folder)
        for path, variable in nnx.to_flat_state(optimizer):
            if path[-1] in ("count", "step"):
                variable.set_value(jnp.array(state.step, variable.dtype))
        for name, pair in moments.items():
            for variable, array in zip(pair, state.moments[name], strict=True):
                variable.set_value(jnp.array(array, variable.dtype))
        nnx.update(self.optimizer, optimizer)
        self.step_count, self.seed = state.step, state.seed

    def _checked(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """The arguments as arrays, after the checks that a compiled function cannot make."""
        model = self.model
        model.check_inputs(**{name: x for name, x in batch.items() if name in arguments_of(model.check_inputs)})
        batch = {name: as_index(x) if name in _INDICES else as_tensor(x) for name, x in batch.items()}
        if model.task == "causal-lm" and "labels" in batch:
            check_labels("labels", known(batch["labels"]), batch["labels"].shape, model.config.vocab_size)
        rows = {len(x) for x in batch.values()}
        if any(number % self.accumulate for number in rows):
            raise InputError("batch", [f"expected rows in {self.accumulate} equal parts (accumulate), got {max(rows)}"])
        mask_BT = batch.get("attention_mask")
        if mask_BT is not None and np.asarray(mask_BT).all():
            del batch["attention_mask"]  # nothing to pack
        return batch


_INDICES = {"input_ids", "position_ids", "segment_ids", "start_positions", "end_positions"}


def _moments(optimizer: nnx.State) -> dict[str, Moments]:
    """The variables of the moments, by the canonical name of the parameter."""
    found: dict[str, dict[str, nnx.Variable]] = {"mu": {}, "nu": {}}
    for path, variable in nnx.to_flat_state(optimizer):
        for kind in found.keys() & set(path[:3]):
            found[kind][name_of(path[3:])] = variable
    return {name: Moments(variable, found["nu"][name]) for name, variable in found["mu"].items()}


@functools.partial(jax.jit, static_argnames=("graphdef", "accumulate"))
def _gradients(graphdef, trained, rest, batch: dict[str, Array], numbers: Array, accumulate: int):
    """The loss, the norm of all gradients, and the gradients; `numbers` are the seed and the number of the step."""
    key = jax.random.fold_in(jax.random.key(numbers[0]), numbers[1])

    def loss_of(trained, part: dict[str, Array], key: Array) -> Array:
        model = nnx.merge(graphdef, trained, rest, copy=True)  # its variables belong to this trace
        _start_streams(model, key)
        return model(**part, **_options(model)).loss

    loss, gradients = _accumulated(jax.value_and_grad(loss_of), trained, batch, key, accumulate)
    return loss, gradient_norm(gradients), gradients


@functools.partial(jax.jit, static_argnames=("graphdef", "optimizer"), donate_argnames=("trained", "moments"))
def _update(graphdef, optimizer, trained, moments, rest, gradients):
    """New weights and the optimizer's new state, in the memory of the old ones."""
    model, changed = nnx.merge(graphdef, trained, rest), nnx.merge(optimizer, moments)
    changed.update(model, gradients)
    return nnx.state(model, model.trainable), nnx.state(changed)


def _accumulated(differentiate, trained, batch: dict[str, Array], key: Array, parts: int):
    """Loss and gradients of a batch, part by part: each weighs as much as it has predictions that count."""
    if parts == 1:
        return differentiate(trained, batch, key)
    batch = {name: x.reshape(parts, -1, *x.shape[1:]) for name, x in batch.items()}
    counts = jax.vmap(_predictions)(batch)
    shares = counts / jnp.maximum(counts.sum(), 1)

    def add_part(sums, part):
        i, share, batch = part
        found = differentiate(trained, batch, jax.random.fold_in(key, i))
        return jax.tree.map(lambda total, x: total + (share * x).astype(x.dtype), sums, found), None

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    return lax.scan(add_part, start, (jnp.arange(parts), shares, batch))[0]


def _predictions(batch: dict[str, Array]) -> Array:
    """How many targets of a language model count; of another task, the rows."""
    labels = batch.get("labels")
    if labels is None or labels.shape != batch.get("input_ids", labels).shape:
        return jnp.array(len(next(iter(batch.values()))))
    targets = losses.causal_lm_targets(labels, batch.get("attention_mask"), batch.get("segment_ids"))
    return (targets != IGNORED_LABEL).sum()


def _start_streams(model: nnx.Module, key: Array) -> None:
    """Gives each random stream a key of its own, and lets it begin anew."""
    streams = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream)]
    for i, stream in enumerate(streams):
        stream.key.set_value(jax.random.fold_in(key, i))
        stream.count.set_value(jnp.zeros((), jnp.uint32))


def _options(model) -> dict[str, int]:
    return dict(logits_to_keep=1) if model.task == "causal-lm" else {}


@functools.partial(jax.jit, static_argnames="graphdef")
def _evaluate(graphdef, state, batch: dict[str, Array]) -> Array:
    model = nnx.merge(graphdef, state)
    return model(**batch, use_cache=False, **_options(model)).loss


@functools.partial(jax.jit, static_argnames="graphdef")
def _predict(graphdef, state, batch: dict[str, Array]):
    return nnx.merge(graphdef, state)(**batch, use_cache=False)
