"""OPT in TensorFlow: Keras 3 models on the TensorFlow backend."""

import os
import sys

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
try:
    import tensorflow  # noqa: F401

    if "keras" not in sys.modules and os.environ["KERAS_BACKEND"] != "tensorflow":
        raise ImportError(f"opt_tf needs KERAS_BACKEND=tensorflow, got {os.environ['KERAS_BACKEND']}")
    import keras
except ModuleNotFoundError as error:
    from opt_core.errors import MissingFrameworkError

    raise MissingFrameworkError("opt_tf needs TensorFlow: pip install opt-zoo[tf]") from error
if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"opt_tf needs Keras on its TensorFlow backend, got {keras.backend.backend()}: set KERAS_BACKEND=tensorflow "
        "before keras is imported"
    )

from opt_tf.cache import Cache
from opt_tf.compilation_cache import use_compilation_cache
from opt_tf.models import (
    TFOPTForCausalLM,
    TFOPTForQuestionAnswering,
    TFOPTForSequenceClassification,
    TFOPTModel,
)
from opt_tf.pretrained import TFOPTPreTrainedModel

__all__ = [
    "Cache",
    "TFOPTForCausalLM",
    "TFOPTForQuestionAnswering",
    "TFOPTForSequenceClassification",
    "TFOPTModel",
    "TFOPTPreTrainedModel",
    "use_compilation_cache",
]
