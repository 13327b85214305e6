"""OPT in JAX, as Flax NNX modules."""

try:
    import flax  # noqa: F401
    import jax  # noqa: F401
except ModuleNotFoundError as error:
    from opt_core.errors import MissingFrameworkError

    raise MissingFrameworkError("opt_flax needs JAX and Flax: pip install opt-zoo[flax]") from error

from opt_flax.cache import Cache
from opt_flax.compilation_cache import use_compilation_cache
from opt_flax.models import (
    FlaxOPTForCausalLM,
    FlaxOPTForQuestionAnswering,
    FlaxOPTForSequenceClassification,
    FlaxOPTModel,
)
from opt_flax.pretrained import FlaxOPTPreTrainedModel

__all__ = [
    "Cache",
    "FlaxOPTForCausalLM",
    "FlaxOPTForQuestionAnswering",
    "FlaxOPTForSequenceClassification",
    "FlaxOPTModel",
    "FlaxOPTPreTrainedModel",
    "use_compilation_cache",
]
