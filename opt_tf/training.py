"""Training steps, TensorFlow: gradients, AdamW, and a state on disk with which any backend goes on.

Batches are the business of `opt_core.batching`, the loop around the steps that of `opt_zoo.training_loop`; `fit` is
Keras' own. A step is two compiled functions, one for the gradients and one that applies them, so that numbers which are
not finite never reach the weights. Of a model made in the scope of a `tf.distribute` strategy every replica has its own
rows of a batch; the numbers are those of one device.
"""

import math
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from conversion.training_state import read_training_state, write_training_state
from opt_core.checks import check_accumulate, check_label_values
from opt_core.errors import InputError, TrainingError
from opt_core.freed_memory import give_back_freed_memory
from opt_core.keywords import arguments_of
from opt_core.optimization import Moments, TrainingRecipe
from opt_tf import losses
from opt_tf.inputs import as_tensor, known
from opt_tf.layers import has_gpu
from opt_tf.loading import to_numpy
from opt_tf.lora import load_adapter, save_adapter
from opt_tf.optimization import clipping_factor, gradient_norm, make_optimizer, name_of
from opt_tf.replicas import check_strategy, sum_over_replicas
from opt_tf.sharding import check_on_no_mesh


class Trainer:
    """Changes a model step by step, by a recipe.

    Args:
        model: any of the three classes with a loss; with adapters (`opt_tf.lora`), these alone are trained.
        seed: of dropout and LayerDrop, which depend on it and the number of the step alone: a run that was interrupted
            goes on as if it had not been.
        accumulate: parts in which a batch is computed, one after another, to save memory.
    """

    def __init__(self, model, recipe: TrainingRecipe | None = None, *, seed: int = 0, accumulate: int = 1):
        check_accumulate(accumulate)
        self.model, self.recipe = model, recipe or TrainingRecipe()
        self.seed, self.accumulate = seed, accumulate
        check_on_no_mesh(model, "Trainer")
        check_strategy(model, "Trainer")
        self.optimizer = make_optimizer(model, self.recipe)
        self.variables = list(model.trainable_variables)
        self.strategy = model.distribute_strategy
        self.replicas = self.strategy.num_replicas_in_sync
        self.step_count = 0
        self.gradient_norm = math.nan
        # On a CPU graphs are faster than XLA, 3.6 s a step for 4.0 (opt-125m, 2 x 512, TensorFlow 2.21, two cores), and
        # are made in a fifth of the time.
        self._compiled = {
            function.__name__: tf.function(function, autograph=False, jit_compile=has_gpu() and self.replicas == 1)
            for function in (self._all_gradients, self._update, self._all_losses, self._outputs)
        }

    def step(self, batch: Mapping[str, np.ndarray]) -> float:
        """Takes one step; returns the loss before it. `gradient_norm` is that of before clipping.

        Args:
            batch: arguments of the model's call, with labels.

        Raises:
            InputError: lists what is wrong with the batch.
            TrainingError: the loss or the gradient is not finite; weights and moments stay as they were.
        """
        sums = None
        for number, (part, shares) in enumerate(self._parts(self._checked(batch), self.accumulate), start=1):
            self.model.seed_generator.state.assign([self.seed, self.step_count * self.accumulate + number])
            sums = self._compiled["_all_gradients"](part, shares, sums, number == self.accumulate)
        loss, norm = (float(self.strategy.experimental_local_results(x)[0]) for x in sums[:2])
        give_back_freed_memory()
        self.gradient_norm = norm
        if not math.isfinite(loss) or not math.isfinite(norm):
            problem = f"expected finite numbers, got a loss of {loss} and a gradient norm of {norm}"
            raise TrainingError(f"step {self.step_count}", [problem])
        self._compiled["_update"](sums[2:])
        self.step_count += 1
        return loss

    def evaluate(self, batch: Mapping[str, np.ndarray]) -> float:
        """The loss of a batch, without dropout."""
        ((part, shares),) = self._parts(self._checked(batch), 1)
        return float(self._compiled["_all_losses"](part, shares))

    def predict(self, batch: Mapping[str, np.ndarray]):
        """The outputs for a batch, without dropout; of several replicas, one computes them."""
        return self._compiled["_outputs"](self._checked(batch))

    def save(self, folder) -> None:
        """Writes the weights (of a model with adapters, these alone) and the training state, for any backend."""
        if self.model.lora is not None:
            save_adapter(self.model, folder)
        else:
            self.model.save_pretrained(folder)
        moments = {name: Moments(*map(to_numpy, pair)) for name, pair in self._moments().items()}
        write_training_state(folder, self.step_count, self.seed, self.recipe, moments)

    def restore(self, folder) -> None:
        """Reads what `save` of any backend wrote: weights, moments, seed and number of steps are then as there.

        Raises:
            CheckpointError: everything wrong with the files, or that is not of this model.
        """
        moments = self._moments()
        state = read_training_state(folder, {name: tuple(pair.exp_avg.shape) for name, pair in moments.items()})
        if self.model.lora is not None:
            load_adapter(self.model, folder)
        else:
            loaded = type(self.model).from_pretrained(folder, dtype=self.model.dtype, config=self.model.config)
            for variable, value in zip(self.model.weights, loaded.weights, strict=True):
                variable.assign(value)
        for name, pair in moments.items():
            for variable, array in zip(pair, state.moments[name], strict=True):
                variable.assign(tf.cast(np.asarray(array), variable.dtype))
        self.optimizer.iterations.assign(state.step)
        self.step_count, self.seed = state.step, state.seed

    @property
    def process_index(self) -> int:
        """Which of the processes that train this model this is: 0, as there is one."""
        return 0

    def agree(self, number: int) -> int:
        """The number that process 0 gave, on every process; all have to call it."""
        return number

    def wait_for_all(self) -> None:
        """Returns once every process has called it."""

    def _checked(self, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """The arguments as tensors, after the checks that a compiled function cannot make."""
        model = self.model
        model.check_inputs(**{name: x for name, x in batch.items() if name in arguments_of(model.check_inputs)})
        batch = {name: as_tensor(x) for name, x in batch.items()}
        check_label_values(model.config, model.task, {name: known(x) for name, x in batch.items()})
        mask_BT = batch.get("attention_mask")
        if mask_BT is not None and tf.reduce_all(tf.cast(mask_BT, tf.bool)):
            del batch["attention_mask"]  # nothing to pack
        return batch

    def _parts(self, batch: dict[str, Tensor], accumulate: int) -> list[tuple[dict[str, Tensor], Tensor]]:
        """The batch in parts, each with its shares of the targets that count in all of it, on every replica its own."""
        number = accumulate * self.replicas
        if number == 1:
            return [(batch, tf.ones([1]))]
        rows = {len(x) for x in batch.values()}
        if any(count % number for count in rows):
            text = f"expected rows in {accumulate} (accumulate) x {self.replicas} (replicas) equal parts"
            raise InputError("batch", [f"{text}, got {max(rows)}"])
        columns = (tf.split(x, number) for x in batch.values())
        parts = [dict(zip(batch, part, strict=True)) for part in zip(*columns, strict=True)]
        of_model = self.model.task, self.model.config
        counts = np.array([losses.counted_targets(part, *of_model) for part in parts], np.float32)
        shares = counts / np.maximum(counts.sum(0), 1)
        pairs = list(zip(parts, tf.unstack(shares), strict=True))
        return [self._on_replicas(pairs[start : start + self.replicas]) for start in range(0, number, self.replicas)]

    def _on_replicas(self, values: list):
        """One of the values for each replica."""
        if self.replicas == 1:
            return values[0]
        deal = self.strategy.experimental_distribute_values_from_function
        return deal(lambda context: values[context.replica_id_in_sync_group])

    def _moments(self) -> dict[str, Moments]:
        """The variables of the moments, by the canonical name of the parameter."""
        pairs = zip(self.optimizer._momentums, self.optimizer._velocities, strict=True)
        return {name_of(v): Moments(*pair) for v, pair in zip(self.variables, pairs, strict=True)}

    # -- compiled -----------------------------------------------------------------------------------------------------

    def _all_gradients(self, *arguments) -> list[Tensor]:
        return self._gradients(*arguments) if self.replicas == 1 else self.strategy.run(self._gradients, arguments)

    def _gradients(
        self, part: dict[str, Tensor], shares: Tensor, sums: list[Tensor] | None, is_last: bool
    ) -> list[Tensor]:
        """The loss, the norm of all gradients, and each of them, clipped; of several parts the sums so far."""
        variables = [v.value for v in self.variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            out = self.model(**part, training=True, **self._options)
            loss = losses.part_of_loss(out, part, tf.unstack(shares))
        gradients = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        found = [loss, *map(tf.convert_to_tensor, gradients)]
        if sums is not None:
            found = [x + total for x, total in zip(found, [sums[0], *sums[2:]], strict=True)]
        if is_last:
            found = sum_over_replicas(found)
        loss, *gradients = found
        norm = gradient_norm(gradients)
        if is_last:
            factor = clipping_factor(self.recipe, norm)
            gradients = [g * tf.cast(factor, g.dtype) for g in gradients]
        return [loss, norm, *gradients]

    def _update(self, gradients: list[Tensor]) -> None:
        """Applies the gradients one after another: a graph would else hold at once all that it makes for them."""
        optimizer, done = self.optimizer, []

        def change(variable: tf.Variable, gradient: Tensor):
            with tf.control_dependencies(done):
                decayed = optimizer.decay(variable)
            with tf.control_dependencies(done + decayed):
                return optimizer.update_step(gradient, variable, optimizer.learning_rate)

        for gradient, variable in zip(gradients, self.variables, strict=True):
            changes = self.strategy.extended.update(variable.value, change, (gradient,), group=False)
            done = list(self.strategy.experimental_local_results(changes))
        with tf.control_dependencies(done):
            optimizer.iterations.assign_add(1)

    def _all_losses(self, part: dict[str, Tensor], shares: Tensor) -> Tensor:
        """The loss of a batch, of which each replica computes its part."""
        if self.replicas == 1:
            return self._loss(part, shares)
        found = self.strategy.run(self._loss, (part, shares))
        return self.strategy.reduce(tf.distribute.ReduceOp.SUM, found, axis=None)

    def _loss(self, part: dict[str, Tensor], shares: Tensor) -> Tensor:
        out = self.model(**part, training=False, **self._options)
        return losses.part_of_loss(out, part, tf.unstack(shares))

    def _outputs(self, batch: dict[str, Tensor]):
        return self.model(**batch, training=False, use_cache=False)

    @property
    def _options(self) -> dict:
        """What spares the outputs that a step does not need."""
        return dict(use_cache=False, **({"logits_to_keep": 1} if self.model.task == "causal-lm" else {}))
