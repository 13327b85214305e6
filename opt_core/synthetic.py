"""Random checkpoints from the schema alone: what tests, benchmarks and demonstrations use in place of trained weights.

Every bias and every norm weight is random, because zeros and ones hide a swapped or forgotten tensor; the square
matrices of a layer are random too, because no shape check sees a forgotten transpose. Not an initialisation for
training: that is each backend's own, with `init_std`.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

from opt_core.config import OPTConfig
from opt_core.schema import Weight, weights

# kind -> (mean, standard deviation). 0.15 keeps the logits of a narrow model away from both zero and saturation.
_DISTRIBUTION = {
    "linear": (0.0, 0.15),
    "embedding": (0.0, 0.15),
    "scale": (1.0, 0.3),
    "bias": (0.0, 0.1),
}


def random_tensors(config: OPTConfig, task: str = "causal-lm", seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (canonical name, float32 array of the schema's shape) for every stored weight, in the schema's order.

    A tensor depends on the seed, its name and its shape, and not on the other tensors, so two configs that share a
    weight's name and shape share its values. `dict(random_tensors(config))` is a whole checkpoint.
    """
    for weight in weights(config, task):
        yield weight.name, random_tensor(weight, config, seed)


def random_tensor(weight: Weight, config: OPTConfig, seed: int = 0) -> np.ndarray:
    """The float32 values of one weight, `{layer}` filled in."""
    mean, deviation = _DISTRIBUTION[weight.kind]
    values = generator_of(weight.name, seed).standard_normal(weight.shape(config), dtype=np.float32)
    values *= np.float32(deviation)
    values += np.float32(mean)
    return values


def generator_of(name: str, seed: int) -> np.random.Generator:
    """Random numbers that depend on the seed and the name of a weight, and on nothing else: NumPy's Philox."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
