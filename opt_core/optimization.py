"""How a training step changes the weights: a recipe of numbers, and AdamW in float64, to which every backend is held.

Each backend computes the same equations with its framework's own optimizer; this file trains nothing by itself.
Sources: AdamW is Loshchilov and Hutter, arXiv:1711.05101; the defaults are those of Zhang et al., arXiv:2205.01068,
section 2.2, with the learning rate of the smallest size.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from opt_core.errors import ConfigError, raise_if
from opt_core.schema import SCHEMA

Array = np.ndarray

CLIPPING_EPSILON = 1e-6  # beside the norm that divides, as in torch.nn.utils.clip_grad_norm_

_DECAYED = {"linear": True, "embedding": True, "scale": False, "bias": False}
_KINDS = {row.name: row.kind for row in SCHEMA}


@dataclass(frozen=True)
class TrainingRecipe:
    """The numbers of AdamW, its schedule and its clipping.

    The learning rate rises over `warmup_steps` steps, then falls on a line to `final_fraction` of itself, which it has
    from the last of `total_steps` steps on; with `total_steps=None` it stays. `weight_decay` acts on what `is_decayed`
    names, apart from the gradient. Gradients whose norm, over all of them together, exceeds `max_gradient_norm` are
    scaled down to it.

    Raises:
        ConfigError: lists every number that is out of range.
    """

    learning_rate: float = 6e-4
    warmup_steps: int = 0
    total_steps: int | None = None
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_gradient_norm: float | None = 1.0

    def __post_init__(self):
        raise_if(ConfigError, "TrainingRecipe", self._problems())

    def learning_rate_at(self, step, clip: Callable = np.clip):
        """The learning rate of step number `step`, counted from 0.

        Args:
            clip: `clip(value, lowest, highest)` of a framework in whose traced functions `step` is not yet a number.
        """
        done = step + 1
        risen = clip(done / max(self.warmup_steps, 1), 0.0, 1.0)
        if self.total_steps is None:
            return self.learning_rate * risen
        fallen = clip((done - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 0.0, 1.0)
        return self.learning_rate * risen * (1 - (1 - self.final_fraction) * fallen)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, source: str = "TrainingRecipe") -> "TrainingRecipe":
        """The inverse of `to_dict`; unknown fields are refused, those that lack take their defaults."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = [f"{name}: not a field of a recipe" for name in fields if name not in known]
        try:
            recipe = cls(**{name: value for name, value in fields.items() if name in known})
        except ConfigError as error:
            raise ConfigError(source, [*unknown, *error.problems]) from None
        raise_if(ConfigError, source, unknown)
        return recipe

    def _problems(self) -> list[str]:
        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "learning_rate": (lambda x: 0 <= x < math.inf, "a finite number of at least 0"),
            "final_fraction": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
            "beta1": (lambda x: 0 <= x < 1, "a number from 0 to below 1"),
            "beta2": (lambda x: 0 <= x < 1, "a number from 0 to below 1"),
            "epsilon": (lambda x: 0 < x < math.inf, "a finite number above 0"),
            "weight_decay": (lambda x: 0 <= x < math.inf, "a finite number of at least 0"),
            "max_gradient_norm": (lambda x: x is None or 0 < x < math.inf, "a finite number above 0, or None"),
        }
        problems = [
            f"{name}: expected {words}, got {value!r}"
            for name, (holds, words) in rules.items()
            if not (_is_number(value := getattr(self, name)) or (value is None and name == "max_gradient_norm"))
            or not holds(value)
        ]
        warmup, total = self.warmup_steps, self.total_steps
        if not _is_count(warmup):
            problems.append(f"warmup_steps: expected an integer of at least 0, got {warmup!r}")
        if total is not None and (not _is_count(total) or total < 1):
            problems.append(f"total_steps: expected an integer of at least 1, or None, got {total!r}")
        elif total is not None and _is_count(warmup) and total < warmup:
            problems.append(f"total_steps: expected at least the {warmup} steps of warm-up, got {total}")
        return problems


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_decayed(name: str) -> bool:
    """Whether weight decay acts on the parameter: on matrices and embeddings, and on both matrices of an adapter.

    Args:
        name: canonical, with or without `model.` before it.

    Raises:
        ValueError: no weight of OPT, nor of an adapter of one.
    """
    row = re.sub(r"(?<=\blayers\.)\d+(?=\.)", "{layer}", name.removeprefix("model."), count=1)
    linear, _, matrix = row.rpartition(".lora_")
    if linear and matrix in ("A.weight", "B.weight") and _KINDS.get(f"{linear}.weight") == "linear":
        return True
    if row not in _KINDS:
        raise ValueError(f"{name}: not a weight of OPT, nor of an adapter")
    return _DECAYED[_KINDS[row]]


# -- the reference ----------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """What AdamW remembers of one parameter, in its shape: moving averages of the gradient and of its square."""

    exp_avg: Array
    exp_avg_sq: Array


class Step(NamedTuple):
    weights: dict[str, Array]
    moments: dict[str, Moments]
    gradient_norm: float  # of all gradients together, before clipping


def adamw_step(
    recipe: TrainingRecipe,
    step: int,
    weights: Mapping[str, Array],
    gradients: Mapping[str, Array],
    moments: Mapping[str, Moments] | None = None,
) -> Step:
    """One step of AdamW in float64; the truth of every backend's optimizer.

        g <- g min(1, max_gradient_norm / (|g| + 1e-6))
        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
        p <- p - rate weight_decay p                                          (what is decayed alone)
        p <- p - rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon),   t = step + 1

    Args:
        step: counted from 0.
        weights, gradients: by canonical name; weights without a gradient stay as they are.
        moments: of the step before; None before the first.
    """
    gradients = {name: np.asarray(g, np.float64) for name, g in gradients.items()}
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    scale = 1.0 if recipe.max_gradient_norm is None else min(1.0, recipe.max_gradient_norm / (norm + CLIPPING_EPSILON))
    rate, t = float(recipe.learning_rate_at(step)), step + 1
    new_weights = {name: np.asarray(p, np.float64) for name, p in weights.items()}
    new_moments = {}
    for name, gradient in gradients.items():
        g, p = gradient * scale, new_weights[name]
        m, v = (np.zeros_like(p), np.zeros_like(p)) if moments is None else moments[name]
        m = recipe.beta1 * m + (1 - recipe.beta1) * g
        v = recipe.beta2 * v + (1 - recipe.beta2) * g**2
        if is_decayed(name):
            p = p - rate * recipe.weight_decay * p
        direction = (m / (1 - recipe.beta1**t)) / (np.sqrt(v / (1 - recipe.beta2**t)) + recipe.epsilon)
        new_weights[name], new_moments[name] = p - rate * direction, Moments(m, v)
    return Step(new_weights, new_moments, norm)
