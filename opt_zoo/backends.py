"""The three backends behind one set of calls: NumPy in, float64 NumPy out. Frameworks are imported only when loaded.

Not a backend itself and no place for arithmetic: what differs between the frameworks here is the names of the classes,
and how an array becomes NumPy's.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from opt_core.errors import MissingFrameworkError

CLASSES = {  # of a task, without the framework's prefix
    "base": "OPTModel",
    "causal-lm": "OPTForCausalLM",
    "sequence-classification": "OPTForSequenceClassification",
    "question-answering": "OPTForQuestionAnswering",
}


class Outputs(NamedTuple):
    """What a causal language model computed, in NumPy."""

    logits: np.ndarray  # [B, T, V] float64
    hidden_states: tuple[np.ndarray, ...]  # L + 1 entries, float64: the input of each layer, then the last hidden state
    loss: float


class LoadedModel:
    """A causal language model of one backend."""

    def __init__(self, model: Any, to_numpy: Callable[[Any], np.ndarray]):
        self.model = model
        self._to_numpy = to_numpy

    def __call__(self, input_ids, attention_mask, labels) -> Outputs:
        """Runs tokens [B, T] with a mask or None; a forward pass without cache, with all hidden states."""
        out = self.model(
            input_ids, attention_mask=attention_mask, labels=labels, output_hidden_states=True, use_cache=False
        )
        hidden_states = tuple(self._float64(x) for x in out.hidden_states)
        return Outputs(self._float64(out.logits), hidden_states, float(self._float64(out.loss)))

    def loss(self, input_ids) -> float:
        """The mean cross entropy of tokens [B, T], of T - 1 in each row."""
        out = self.model(
            input_ids, labels=input_ids, logits_to_keep=1, use_cache=False
        )  # few logits: [B, T, V] is much
        return float(self._float64(out.loss))

    def generate(self, input_ids, attention_mask=None, max_new_tokens: int = 20) -> np.ndarray:
        """Greedy token ids [B, T + n], prompt included."""
        tokens = self.model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens)
        return np.asarray(self._to_numpy(tokens)).astype(np.int64)

    def _float64(self, array) -> np.ndarray:
        return np.asarray(self._to_numpy(array)).astype(np.float64)


class Backend(NamedTuple):
    """Where a backend is and what it needs."""

    name: str
    package: str
    causal_lm: str  # the class in `package`
    frameworks: tuple[str, ...]  # modules that must be importable
    to_numpy: Callable[[Any], np.ndarray]
    use_full_float32: Callable[[], None]  # no TF32 in matrix products, for the whole process
    freeze: Callable[[Any], Any] = lambda model: model  # no bookkeeping for gradients

    def load(self, source, *, dtype: str | None = None, attn_implementation: str = "sdpa", **options) -> LoadedModel:
        """Loads a checkpoint in evaluation mode; arguments as in `from_pretrained`."""
        model_class = getattr(importlib.import_module(self.package), self.causal_lm)
        model = model_class.from_pretrained(source, dtype=dtype, attn_implementation=attn_implementation, **options)
        return LoadedModel(self.freeze(model), self.to_numpy)

    def model_class(self, task: str = "causal-lm") -> Any:
        """The class of a task of `opt_core.schema.TASKS`."""
        prefix = self.causal_lm.removesuffix(CLASSES["causal-lm"])
        return getattr(importlib.import_module(self.package), prefix + CLASSES[task])

    def part(self, name: str) -> Any:
        """A module of the backend, such as `training` or `lora`: all three have the same ones."""
        return importlib.import_module(f"{self.package}.{name}")

    @property
    def versions(self) -> dict[str, str]:
        """Version of each framework package."""
        return {name: importlib.metadata.version(name) for name in self.frameworks}


def _freeze_torch(model):
    return model.requires_grad_(False)


def _torch_to_numpy(tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def _use_full_float32_in_torch() -> None:
    importlib.import_module("torch").set_float32_matmul_precision("highest")


def _use_full_float32_in_tf() -> None:
    importlib.import_module("tensorflow").config.experimental.enable_tensor_float_32_execution(False)


def _use_full_float32_in_jax() -> None:
    importlib.import_module("jax").config.update("jax_default_matmul_precision", "highest")


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "torch",
            "opt_torch",
            "OPTForCausalLM",
            ("torch",),
            _torch_to_numpy,
            _use_full_float32_in_torch,
            _freeze_torch,
        ),
        Backend("tf", "opt_tf", "TFOPTForCausalLM", ("tensorflow", "keras"), np.asarray, _use_full_float32_in_tf),
        Backend("flax", "opt_flax", "FlaxOPTForCausalLM", ("jax", "flax"), np.asarray, _use_full_float32_in_jax),
    )
}


def installed_backends() -> tuple[str, ...]:
    """Names of the backends whose frameworks are installed; imports none of them."""
    return tuple(name for name, backend in BACKENDS.items() if not _missing(backend))


def load_backend(name: str) -> Backend:
    """Imports a backend with its framework.

    Raises:
        KeyError: no backend has that name.
        MissingFrameworkError: says what to install.
    """
    backend = BACKENDS[name]
    missing = _missing(backend)
    if missing:
        raise MissingFrameworkError(f"backend {name} needs {' and '.join(missing)}: pip install opt-zoo[{name}]")
    with _quiet_import() if name == "tf" else contextlib.nullcontext():
        importlib.import_module(backend.package)
    return backend


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Keeps what an import writes on stderr, and shows it only where the import fails.

    TensorFlow 2.21 greets there from C++, before it reads TF_CPP_MIN_LOG_LEVEL.
    """
    with tempfile.TemporaryFile() as kept:
        stderr = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(stderr, kept.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _missing(backend: Backend) -> list[str]:
    return [module for module in backend.frameworks if importlib.util.find_spec(module) is None]
