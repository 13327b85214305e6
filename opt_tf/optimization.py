"""The optimizer, TensorFlow: Keras' AdamW with the equations of `opt_core.optimization`.

Keras 3.15 adds epsilon before it corrects the second moment, divides by the norm alone where it clips, and decays
biases and norms as well. The rest is its own: `compile`, `fit`, callbacks, saving, accumulation, loss scaling.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core.errors import InputError, raise_if
from opt_core.optimization import CLIPPING_EPSILON, TrainingRecipe, is_decayed
from opt_tf.layers import at_least_float32
from opt_tf.replicas import sum_over_replicas


def make_optimizer(model, recipe: TrainingRecipe) -> "AdamW":
    """A Keras optimizer that takes the steps of `opt_core.optimization.adamw_step`.

    It changes `model.trainable_variables`. Moments have the dtypes of the parameters.
    """
    with model.distribute_strategy.scope():
        optimizer = AdamW(recipe)
        optimizer.build(model.trainable_variables)
    return optimizer


@keras.saving.register_keras_serializable("opt_tf")
class AdamW(keras.optimizers.AdamW):
    """`keras.optimizers.AdamW` by a recipe: for `compile`, or for a loop of one's own.

    The learning rate is a variable, which callbacks may set, where the recipe keeps it constant, else a schedule. With
    `gradient_accumulation_steps` a step of the recipe is one that changes the weights.

    Args:
        recipe: a `TrainingRecipe`, or what its `to_dict` returned.
    """

    def __init__(
        self,
        recipe: TrainingRecipe | Mapping | None = None,
        *,
        gradient_accumulation_steps: int | None = None,
        loss_scale_factor: float | None = None,
        name: str = "adamw",
    ):
        recipe = recipe if isinstance(recipe, TrainingRecipe) else TrainingRecipe.from_dict(recipe or {})
        is_constant = not recipe.warmup_steps and recipe.total_steps is None
        super().__init__(
            float(recipe.learning_rate) if is_constant else Schedule(recipe),
            weight_decay=recipe.weight_decay,
            gradient_accumulation_steps=gradient_accumulation_steps,
            loss_scale_factor=loss_scale_factor,
            name=name,
        )
        self.recipe = recipe

    def build(self, variables: list[keras.Variable]) -> None:
        if not self.built:
            raise_if(InputError, "AdamW", self._replica_problems(variables))
            self.exclude_from_weight_decay([v for v in variables if not _is_decayed(v)])
            super().build(variables)

    def _replica_problems(self, variables: list[keras.Variable]) -> Iterator[str]:
        strategy = self._distribution_strategy
        plain = None if strategy.num_replicas_in_sync > 1 else strategy
        if {getattr(v.value, "distribute_strategy", plain) for v in variables} - {strategy}:
            yield "optimizer: expected one made in the scope of the strategy in whose scope the model was made"
        if self.gradient_accumulation_steps and strategy.num_replicas_in_sync > 1:
            yield "gradient_accumulation_steps: expected None under a strategy of several replicas (Keras 3.15)"

    def update_step(self, gradient: Tensor, variable: tf.Variable, learning_rate) -> tf.Operation | None:
        """What one parameter is changed by after its decay, in float32 at least: `opt_core.optimization.adamw_step`."""
        index = self._get_variable_index(variable)
        m, v = self._momentums[index].value, self._velocities[index].value
        rate = tf.cast(learning_rate, tf.float64)
        if variable.dtype in (tf.float16, tf.bfloat16):
            return self._update_half(m, v, gradient, variable, rate)
        beta1, beta2 = (variable.dtype.as_numpy_dtype(beta) for beta in (self.recipe.beta1, self.recipe.beta2))
        bias1, root2 = self._corrections(beta1, beta2)
        numbers = dict(lr=rate * root2 / bias1, epsilon=self.recipe.epsilon * root2, beta1=beta1, beta2=beta2)
        numbers.update(beta1_power=0, beta2_power=0)  # it would correct in the dtype of the parameter
        numbers = {name: tf.cast(number, variable.dtype) for name, number in numbers.items()}
        return tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=m.handle, v=v.handle, grad=tf.cast(gradient, variable.dtype), **numbers
        )

    def decay(self, variable: tf.Variable) -> list[tf.Operation]:
        """What one parameter is changed by before its step, where it is decayed."""
        if not self._use_weight_decay(variable):
            return []
        decay = tf.cast(self.learning_rate, tf.float64) * self.recipe.weight_decay
        return [variable.assign_sub(variable * tf.cast(decay, variable.dtype))]

    def _update_half(self, m, v, gradient, variable, rate: Tensor) -> tf.Operation:
        recipe = self.recipe
        bias1, root2 = (tf.cast(x, tf.float32) for x in self._corrections(recipe.beta1, recipe.beta2))
        g, p, new_m, new_v = (tf.cast(x, tf.float32) for x in (gradient, variable, m, v))
        new_m = recipe.beta1 * new_m + (1 - recipe.beta1) * g
        new_v = recipe.beta2 * new_v + (1 - recipe.beta2) * tf.square(g)
        p -= tf.cast(rate, p.dtype) / bias1 * new_m / (tf.sqrt(new_v) / root2 + recipe.epsilon)
        m.assign(tf.cast(new_m, m.dtype))
        v.assign(tf.cast(new_v, v.dtype))
        return variable.assign(tf.cast(p, variable.dtype))

    def _corrections(self, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
        """1 - beta1^t and the root of 1 - beta2^t in float64, for the step that is taken next."""
        t = tf.cast(self.iterations, tf.float64) + 1
        return 1 - tf.pow(tf.cast(beta1, t.dtype), t), tf.sqrt(1 - tf.pow(tf.cast(beta2, t.dtype), t))

    def get_config(self) -> dict:
        recipe = self.recipe
        if isinstance(self._learning_rate, keras.Variable):  # a callback may have set it
            recipe = dataclasses.replace(recipe, learning_rate=float(self._learning_rate.numpy()))
        config = super().get_config()
        kept = ("gradient_accumulation_steps", "loss_scale_factor", "name")
        return {"recipe": recipe.to_dict(), **{name: config[name] for name in kept}}

    # What Keras asks its optimizers, answered by the recipe.

    def _clip_gradients(self, gradients: list) -> list[Tensor]:
        gradients = [tf.convert_to_tensor(g) for g in gradients]  # rows of an embedding become the whole of it
        gradients = sum_over_replicas(gradients)  # Keras 3.15 would add them up after it has clipped each
        if self.recipe.max_gradient_norm is None:
            return gradients
        factor = clipping_factor(self.recipe, gradient_norm(gradients))
        return [g * tf.cast(factor, g.dtype) for g in gradients]

    def _all_reduce_sum_gradients(self, grads_and_vars: list) -> list:
        return grads_and_vars  # `_clip_gradients` has

    def _apply_weight_decay(self, variables: list) -> None:
        for variable in variables:
            self.decay(getattr(variable, "value", variable))

    def _get_current_learning_rate(self):
        rate = self._learning_rate
        return rate(self.iterations) if isinstance(rate, Schedule) else super()._get_current_learning_rate()


@keras.saving.register_keras_serializable("opt_tf")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rates of a recipe: warm-up, then a line."""

    def __init__(self, recipe: TrainingRecipe | Mapping):
        self.recipe = recipe if isinstance(recipe, TrainingRecipe) else TrainingRecipe.from_dict(recipe)

    def __call__(self, step) -> Tensor:
        rate = self.recipe.learning_rate_at(tf.cast(step, tf.float64), tf.clip_by_value)
        return tf.cast(rate, tf.float32)

    def get_config(self) -> dict:
        return {"recipe": self.recipe.to_dict()}


def clipping_factor(recipe: TrainingRecipe, norm: Tensor) -> Tensor:
    """What all gradients are multiplied with, where their norm together is `norm`."""
    if recipe.max_gradient_norm is None:
        return tf.ones_like(norm)
    return tf.minimum(tf.ones_like(norm), recipe.max_gradient_norm / (norm + CLIPPING_EPSILON))


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, in float32 at least."""
    squares = [tf.reduce_sum(tf.square(at_least_float32(g))) for g in gradients]
    return tf.sqrt(tf.add_n(squares))


def name_of(variable: keras.Variable) -> str:
    """The canonical name of a parameter, from its Keras path."""
    name = variable.path.replace("/", ".").removeprefix("model.")
    return f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name


def _is_decayed(variable: keras.Variable) -> bool:
    try:
        return is_decayed(name_of(variable))
    except ValueError:  # of a layer that is not ours: matrices, as everywhere
        return len(variable.shape) > 1
