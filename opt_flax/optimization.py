"""The optimizer, Flax NNX: AdamW of optax with the equations of `opt_core.optimization`.

Clipping is written here, since optax divides by the norm alone, without the 1e-6 beside it; and the moments, since of
`optax.scale_by_adam` XLA makes one program for the weights that reads the old moments, and another for the new moments:
it copies all old ones first, 1 GB for the smallest OPT (jax 0.10, CPU).
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax

from opt_core.optimization import CLIPPING_EPSILON, TrainingRecipe, is_decayed
from opt_flax.layers import at_least_float32


def make_optimizer(model, recipe: TrainingRecipe) -> nnx.Optimizer:
    """An `nnx.Optimizer` that takes the steps of `opt_core.optimization.adamw_step`.

    It changes `model.trainable`: the adapters of a model that has some, else all parameters. Moments have the dtypes of
    the parameters.
    """
    return nnx.Optimizer(model, adamw(recipe), wrt=model.trainable)


@functools.cache
def adamw(recipe: TrainingRecipe) -> optax.GradientTransformation:
    """The recipe as an optax transformation, for parameters under the names of our modules.

    Equal recipes get the same one, since functions that are compiled for one know it by its identity.
    """
    clipping = [] if recipe.max_gradient_norm is None else [clip_by_norm(recipe.max_gradient_norm)]
    return optax.chain(
        *clipping,
        scale_by_moments(recipe),
        optax.add_decayed_weights(recipe.weight_decay, mask=_decayed),
        optax.scale_by_learning_rate(lambda step: recipe.learning_rate_at(step, jnp.clip)),
    )


def scale_by_moments(recipe: TrainingRecipe) -> optax.GradientTransformation:
    """What `optax.scale_by_adam` computes, from the new moments."""

    def start(parameters) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, parameters)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, parameters))

    def update(gradients, state: optax.ScaleByAdamState, _=None) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        count = state.count + 1
        first, second = 1 - recipe.beta1**count, 1 - recipe.beta2**count
        means = jax.tree.map(functools.partial(_average, recipe.beta1), state.mu, gradients)
        squares = jax.tree.map(functools.partial(_average, recipe.beta2), state.nu, jax.tree.map(jnp.square, gradients))
        directions = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + recipe.epsilon), means, squares)
        return directions, optax.ScaleByAdamState(count, means, squares)

    return optax.GradientTransformation(start, update)


def _average(beta: float, old: Array, new: Array) -> Array:
    return lax.optimization_barrier((beta * old + (1 - beta) * new).astype(old.dtype))


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """Multiplies all gradients with min(1, largest / (norm + 1e-6))."""

    def clip(gradients, _) -> optax.Updates:
        factor = jnp.minimum(1, largest / (gradient_norm(gradients) + CLIPPING_EPSILON))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), gradients)

    return optax.stateless(clip)


def gradient_norm(gradients) -> Array:
    """The norm of all gradients together, in float32 at least."""
    squares = [jnp.square(g.astype(at_least_float32(g.dtype))).sum() for g in jax.tree.leaves(gradients)]
    return jnp.sqrt(sum(squares))


def name_of(path: Iterable[str | int]) -> str:
    """The canonical name of a parameter, from its path in the model."""
    name = ".".join(map(str, path)).removeprefix("model.")
    return f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name


def _decayed(parameters):
    return jax.tree_util.tree_map_with_path(_is_decayed, parameters)


def _is_decayed(path: tuple, parameter: Array) -> bool:
    try:
        return is_decayed(name_of(key.key for key in path if isinstance(key, jax.tree_util.DictKey)))
    except ValueError:  # of a module that is not ours: matrices, as everywhere
        return parameter.ndim > 1
