"""Training steps, Flax NNX: gradients, AdamW, and a state on disk with which any backend goes on.

Batches are the business of `opt_core.batching`, the loop around the steps that of `opt_zoo.training_loop`. A step is
two compiled functions, one for the gradients and one that writes new weights and moments over the old ones, so that
numbers which are not finite never reach them. Of a model on a mesh (`opt_flax.sharding`) gradients and moments are cut
as the weights are; every process calls the same methods with the same batch, and gets the same numbers.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import NamedSharding

from conversion.slices import read_part
from conversion.training_state import read_training_state, write_training_state
from opt_core.checks import check_accumulate, check_label_values
from opt_core.errors import InputError, TrainingError
from opt_core.freed_memory import give_back_freed_memory
from opt_core.keywords import arguments_of
from opt_core.optimization import Moments, TrainingRecipe
from opt_core.sharding import local_batch
from opt_flax import losses
from opt_flax.inputs import as_index, as_tensor, known
from opt_flax.lora import load_adapter, save_adapter
from opt_flax.optimization import gradient_norm, make_optimizer, name_of
from opt_flax.processes import Whole, has_processes, of_process_0, other_processes, write_from_first
from opt_flax.sharding import Placement


class Trainer:
    """Changes a model step by step, by a recipe.

    A step overwrites the arrays of the model: who keeps some of them, or shares them with another model (`nnx.clone`),
    has to copy them before the next step. The first arrays are copied here.

    Args:
        model: any of the three classes with a loss; with adapters (`opt_flax.lora`), these alone are trained.
        seed: of dropout and LayerDrop, which depend on it and the number of the step alone: a run that was interrupted
            goes on as if it had not been.
        accumulate: parts in which a batch is computed, one after another, to save memory.
    """

    def __init__(self, model, recipe: TrainingRecipe | None = None, *, seed: int = 0, accumulate: int = 1):
        check_accumulate(accumulate)
        self.model, self.recipe = model, recipe or TrainingRecipe()
        self.seed, self.accumulate = seed, accumulate
        nnx.update(model, jax.tree.map(jnp.copy, nnx.state(model, model.trainable)))
        self.optimizer = make_optimizer(model, self.recipe)
        self._place_counts()
        self.step_count = 0
        self.gradient_norm = math.nan

    def step(self, batch: Mapping[str, np.ndarray]) -> float:
        """Takes one step; returns the loss before it. `gradient_norm` is that of before clipping.

        Args:
            batch: arguments of the model's call, with labels; the whole batch on every process.

        Raises:
            InputError: lists what is wrong with the batch.
            TrainingError: the loss or the gradient is not finite; weights and moments stay as they were. Or another
                process is gone, and with it its part of the weights.
        """
        batch = self._checked(batch, self.accumulate)
        self.model.train()
        graphdef, trained, rest = nnx.split(self.model, self.model.trainable, ...)
        numbers = np.uint32([self.seed, self.step_count])
        with self._others():
            given = graphdef, trained, rest, batch, numbers, self.accumulate, self._layout()
            loss, norm, gradients = _gradients_for(self.model.placement)(*given)
            loss, self.gradient_norm = float(loss), float(norm)
        give_back_freed_memory()
        if not math.isfinite(loss) or not math.isfinite(self.gradient_norm):
            problem = f"expected finite numbers, got a loss of {loss} and a gradient norm of {self.gradient_norm}"
            raise TrainingError(f"step {self.step_count}", [problem])
        optimizer, moments = nnx.split(self.optimizer)
        with self._others():
            trained, moments = _update(graphdef, optimizer, trained, moments, rest, gradients)
        nnx.update(self.model, trained)
        nnx.update(self.optimizer, moments)
        self.step_count += 1
        return loss

    def evaluate(self, batch: Mapping[str, np.ndarray]) -> float:
        """The loss of a batch, without dropout."""
        self.model.eval()
        batch = self._checked(batch)
        with self._others():
            return float(_evaluate(*nnx.split(self.model), batch))

    def predict(self, batch: Mapping[str, np.ndarray]):
        """The outputs for a batch, without dropout; on every process those of all rows."""
        self.model.eval()
        batch = self._checked(batch)
        with self._others():
            return jax.block_until_ready(_predict(*nnx.split(self.model), batch))

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

    def restore(self, folder) -> None:
        """Reads what `save` of any backend wrote: weights, moments, seed and number of steps are then as there.

        Each process reads its own parts, of files that any number of processes wrote.

        Raises:
            CheckpointError: everything wrong with the files, or that is not of this model.
        """
        model, optimizer = self.model, nnx.state(self.optimizer)
        moments = _moments(optimizer)
        state = read_training_state(folder, {name: pair.exp_avg.shape for name, pair in moments.items()})
        if model.lora is None:
            options = dict(config=model.config, dtype=model.dtype, device_mesh=model.device_mesh)
            loaded = type(model).from_pretrained(folder, **options)
            nnx.update(model, jax.tree.map(jnp.copy, nnx.state(loaded, nnx.Param)))
        else:
            load_adapter(model, folder)
        for path, variable in nnx.to_flat_state(optimizer):
            if path[-1] in ("count", "step"):
                variable.set_value(jnp.array(state.step, variable.dtype))
        for name, pair in moments.items():
            for variable, array in zip(pair, state.moments[name], strict=True):
                variable.set_value(_read_as(variable.get_value(), array, model.placement))
        nnx.update(self.optimizer, optimizer)
        self._place_counts()
        self.step_count, self.seed = state.step, state.seed

    @property
    def process_index(self) -> int:
        """Which of the processes that train this model this is; 0 for one alone."""
        return jax.process_index() if has_processes(self.model.placement) else 0

    def agree(self, number: int) -> int:
        """The number that process 0 gave, on every process; all have to call it."""
        with self._others():
            return of_process_0(self.model.placement, number)

    def wait_for_all(self) -> None:
        """Returns once every process has called it."""
        self.agree(0)

    def _others(self):
        return other_processes(self.model.placement, self.step_count)

    def _layout(self) -> tuple[NamedSharding, ...] | None:
        """How the weights that are trained lie on a mesh, which is how their gradients are to lie."""
        if self.model.placement is None:
            return None
        return tuple(x.sharding for x in jax.tree.leaves(nnx.state(self.model, self.model.trainable)))

    def _place_counts(self) -> None:
        """Puts the optimizer's numbers of steps on every device, as a step leaves them, or it is compiled twice."""
        if self.model.placement is not None:
            counts = nnx.state(self.optimizer, lambda path, x: path[-1] in ("count", "step"))
            nnx.update(self.optimizer, jax.tree.map(self.model.placement.put, counts))

    def _checked(self, batch: Mapping[str, np.ndarray], parts: int = 1) -> dict[str, Array]:
        """The arguments as arrays on the devices, after the checks that a compiled function cannot make.

        Several parts are a first dimension.
        """
        model = self.model
        model.check_inputs(**{name: x for name, x in batch.items() if name in arguments_of(model.check_inputs)})
        batch = {name: as_index(x) if name in _INDICES else as_tensor(x) for name, x in batch.items()}
        check_label_values(model.config, model.task, {name: known(x) for name, x in batch.items()})
        rows = {len(x) for x in batch.values()}
        if any(number % parts for number in rows):
            raise InputError("batch", [f"expected rows in {parts} equal parts (accumulate), got {max(rows)}"])
        if model.placement is not None:
            local_batch(max(rows) // parts, model.mesh, model.placement.rules)
        mask_BT = batch.get("attention_mask")
        if mask_BT is not None and np.asarray(mask_BT).all():
            del batch["attention_mask"]  # nothing to pack
        if parts > 1:
            batch = {name: x.reshape(parts, -1, *x.shape[1:]) for name, x in batch.items()}
        return {name: _put_rows(model.placement, x, dim=int(parts > 1)) for name, x in batch.items()}

    def _save_state(self, folder) -> None:
        variables = _moments(nnx.state(self.optimizer))
        arrays = {
            f"{kind}.{name}": variable.get_value()
            for name, pair in variables.items()
            for kind, variable in zip(Moments._fields, pair, strict=True)
        }

        def write(whole: dict[str, Whole]) -> None:
            moments = {
                name: Moments(*(_Gathered(pair.exp_avg.shape, whole[f"{kind}.{name}"]) for kind in Moments._fields))
                for name, pair in variables.items()
            }
            write_training_state(folder, self.step_count, self.seed, self.recipe, moments)

        write_from_first(self.model.placement, arrays, write)


class _Gathered(NamedTuple):
    """A moment that is made whole when NumPy asks for it."""

    shape: tuple[int, ...]
    gather: Whole

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.gather()


_INDICES = {"input_ids", "position_ids", "segment_ids", "start_positions", "end_positions"}


def _moments(optimizer: nnx.State) -> dict[str, Moments]:
    """The variables of the moments, by the canonical name of the parameter."""
    found: dict[str, dict[str, nnx.Variable]] = {"mu": {}, "nu": {}}
    for path, variable in nnx.to_flat_state(optimizer):
        for kind in found.keys() & set(path[:3]):
            found[kind][name_of(path[3:])] = variable
    return {name: Moments(variable, found["nu"][name]) for name, variable in found["mu"].items()}


def _put_rows(placement: Placement | None, x: Array, dim: int) -> Array:
    """The rows of a batch, along one dimension of an array of it, over the axes of a mesh that cut them."""
    if placement is None:
        return x
    return placement.put(np.asarray(x), placement.sharding(*[None] * dim, placement.rows(x.shape[dim])))


def _read_as(old: Array, stored: np.ndarray, placement: Placement | None) -> Array:
    """The values of a file, in the dtype and the parts of an array; no other parts are read."""
    if placement is None:
        return jnp.array(stored, old.dtype)
    parts = jax.make_array_from_callback(old.shape, old.sharding, lambda index: read_part(stored, index), old.dtype)
    return jnp.copy(parts)  # what lies on the file's pages cannot be written over


def _find_gradients(
    graphdef, trained, rest, batch: dict[str, Array], numbers: Array, accumulate: int, layout: tuple | None = None
):
    """The loss, the norm of all gradients, and the gradients; `numbers` are the seed and the number of the step."""
    key = jax.random.fold_in(jax.random.key(numbers[0]), numbers[1])

    model = nnx.merge(graphdef, trained, rest, copy=True)
    shares = _shares(model, batch, accumulate)

    def loss_of(trained, part: dict[str, Array], shares: Array, key: Array) -> Array:
        model = nnx.merge(graphdef, trained, rest, copy=True)  # its variables belong to this trace
        _start_streams(model, key)
        return losses.part_of_loss(model(**part, **_options(model)), part, shares)

    def differentiate(part: dict[str, Array], shares: Array, key: Array):
        loss, gradients = jax.value_and_grad(loss_of)(trained, part, shares, key)
        if layout is not None:
            layout_of = jax.tree.unflatten(jax.tree.structure(gradients), layout)
            gradients = lax.with_sharding_constraint(gradients, layout_of)
        return loss, gradients

    def add_part(sums, part):
        i, shares, batch = part
        found = differentiate(batch, shares, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, sums, found), None

    if accumulate == 1:
        loss, gradients = differentiate(batch, shares, key)
    else:
        start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
        (loss, gradients), _ = lax.scan(add_part, start, (jnp.arange(accumulate), shares, batch))
    return loss, gradient_norm(gradients), gradients


_gradients = jax.jit(_find_gradients, static_argnames=("graphdef", "accumulate", "layout"))
# XLA on a CPU (jax 0.10) would gather the weights of all layers as soon as it can, and add up the gradients of all
# layers between devices in one go at the end: both as whole as on a single device.
_gradients_on_cpus = jax.jit(
    _find_gradients,
    static_argnames=("graphdef", "accumulate", "layout"),
    compiler_options={
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        "xla_disable_hlo_passes": "cpu-all-reduce-combiner",
    },
)


def _gradients_for(placement: Placement | None):
    """The compiled function for the devices of a model."""
    is_on_cpus = placement is not None and placement.device_mesh.devices.flat[0].platform == "cpu"
    return _gradients_on_cpus if is_on_cpus else _gradients


@functools.partial(jax.jit, static_argnames=("graphdef", "optimizer"), donate_argnames=("trained", "moments"))
def _update(graphdef, optimizer, trained, moments, rest, gradients):
    """New weights and the optimizer's new state, in the memory of the old ones."""
    model, changed = nnx.merge(graphdef, trained, rest), nnx.merge(optimizer, moments)
    changed.update(model, gradients)
    return nnx.state(model, model.trainable), nnx.state(changed)


def _shares(model, batch: dict[str, Array], parts: int) -> Array:
    """Of the targets that count in a batch, those of each of its parts, which are the first dimension of what is in it.

    Without parts the one of the whole, all.
    """
    if parts == 1:
        return jnp.ones(1)
    counts = jax.vmap(lambda part: jnp.array(losses.counted_targets(part, model.task, model.config)))(batch)
    return counts / jnp.maximum(counts.sum(0), 1)


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
    return losses.part_of_loss(model(**batch, use_cache=False, **_options(model)), batch, (1.0,))


@functools.partial(jax.jit, static_argnames="graphdef")
def _predict(graphdef, state, batch: dict[str, Array]):
    model = nnx.merge(graphdef, state)
    out = model(**batch, use_cache=False)
    return lax.with_sharding_constraint(out, model.placement.sharding()) if has_processes(model.placement) else out
