"""One sample of benchmarks/training.py in a process of its own: `python -m benchmarks.training_worker JOB`.

A step is the loss of the causal language model in training mode, its gradients, clipping to the norm 1, and AdamW with
weight decay. Every contestant begins with the same weights and has the same batches, so that their losses can be
compared. The first steps, which compile, are not timed. Memory is what the process holds at its peak beyond what it
held after its imports: weights, gradients and both moments among it. The last line of stdout is one JSON document.
"""

import abc
import importlib
import json
import math
import os
import statistics
import sys
import time
from typing import Any, NamedTuple

import numpy as np

from opt_core.optimization import TrainingRecipe
from opt_zoo.backends import load_backend
from opt_zoo.bench.contestant import NotRunError
from opt_zoo.bench.memory import PeakMemory
from opt_zoo.bench.peers import _need, _published_class
from opt_zoo.bench.worker import FIRST_TOKEN_ID

RECIPE = TrainingRecipe(learning_rate=1e-5)
DTYPES = ("float32", "bfloat16")  # of weights, moments and products


class Job(NamedTuple):
    """What a worker is told."""

    contestant: str  # a key of CONTESTANTS
    folder: str
    dtype: str  # one of DTYPES
    batch: int
    length: int
    warm_up: int  # steps that are not timed
    runs: int  # steps that are


class Contestant(abc.ABC):
    """One that trains."""

    format = "safetensors"  # a key of `conversion.formats.FORMATS`

    def __init__(self, job: Job):
        self.job = job

    @abc.abstractmethod
    def start(self) -> None:
        """Imports all that is needed; raises NotRunError."""

    @abc.abstractmethod
    def load(self) -> None:
        """Makes the model and the optimizer."""

    @abc.abstractmethod
    def step(self, ids_BT: np.ndarray) -> float:
        """The loss before the step, when the step is done."""


class Ours(Contestant):
    framework = ""

    def start(self) -> None:
        self._backend = load_backend(self.framework)
        self._trainer_class = self._backend.part("training").Trainer

    def load(self) -> None:
        model = self._backend.model_class().from_pretrained(self.job.folder, dtype=self.job.dtype)
        self._trainer = self._trainer_class(model, RECIPE)

    def step(self, ids_BT: np.ndarray) -> float:
        return self._trainer.step({"input_ids": ids_BT, "labels": ids_BT})


class OursTorch(Ours):
    framework = "torch"


class OursTF(Ours):
    framework = "tf"


class OursFlax(Ours):
    framework = "flax"


class TransformersTorch(Contestant):
    attention = "sdpa"

    def start(self) -> None:
        self._class = _published_class("OPTForCausalLM", "torch", "torch")
        self._torch = importlib.import_module("torch")

    def load(self) -> None:
        options = dict(dtype=self.job.dtype, attn_implementation=self.attention)
        self._model = self._class.from_pretrained(self.job.folder, **options).train()
        rates = dict(lr=RECIPE.learning_rate, betas=(RECIPE.beta1, RECIPE.beta2), weight_decay=RECIPE.weight_decay)
        self._optimizer = self._torch.optim.AdamW(self._model.parameters(), fused=True, **rates)

    def step(self, ids_BT: np.ndarray) -> float:
        ids = self._torch.from_numpy(ids_BT)
        loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), RECIPE.max_gradient_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


class TransformersTorchEager(TransformersTorch):
    attention = "eager"


class TransformersFlax(Contestant):
    format = "flax-msgpack"

    def start(self) -> None:
        _need("jax", "flax", "optax")
        self._class = _published_class("FlaxOPTForCausalLM", "flax", "Flax")
        self._jax, self._optax = importlib.import_module("jax"), importlib.import_module("optax")

    def load(self) -> None:
        jax, optax = self._jax, self._optax
        self._model = self._class.from_pretrained(self.job.folder, dtype=getattr(jax.numpy, self.job.dtype))
        self._params = self._model.params
        if self.job.dtype == "bfloat16":
            self._params = self._model.to_bf16(self._params)
        rates = dict(b1=RECIPE.beta1, b2=RECIPE.beta2, weight_decay=RECIPE.weight_decay)
        clipping = optax.clip_by_global_norm(RECIPE.max_gradient_norm)
        self._optimizer = optax.chain(clipping, optax.adamw(RECIPE.learning_rate, **rates))
        self._state = self._optimizer.init(self._params)
        self._random = jax.random.key(0)
        self._compiled = jax.jit(self._step, donate_argnums=(0, 1))

    def _step(self, params: Any, state: Any, ids_BT: Any, random: Any) -> Any:
        optax, numpy = self._optax, self._jax.numpy

        def loss_of(params: Any) -> Any:
            mask_BT = numpy.ones_like(ids_BT)
            logits_BTV = self._model(ids_BT, mask_BT, params=params, dropout_rng=random, deterministic=False).logits
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits_BTV[:, :-1].astype("float32"), ids_BT[:, 1:]
            )
            return losses.mean()

        loss, gradients = self._jax.value_and_grad(loss_of)(params)
        updates, state = self._optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    def step(self, ids_BT: np.ndarray) -> float:
        self._random, now = self._jax.random.split(self._random)
        self._params, self._state, loss = self._compiled(self._params, self._state, ids_BT, now)
        return float(loss)


class TransformersTF(Contestant):
    format = "tf-safetensors"
    with_xla = False

    def start(self) -> None:
        os.environ["TF_USE_LEGACY_KERAS"] = "1"  # read when TensorFlow is imported
        _need("tensorflow", "tf_keras")
        self._class = _published_class("TFOPTForCausalLM", "tensorflow", "TensorFlow")
        self._tf, self._keras = importlib.import_module("tensorflow"), importlib.import_module("tf_keras")
        self._keras.mixed_precision.set_global_policy(self.job.dtype)

    def load(self) -> None:
        self._model = self._class.from_pretrained(self.job.folder)
        rates = dict(beta_1=RECIPE.beta1, beta_2=RECIPE.beta2, weight_decay=RECIPE.weight_decay)
        self._optimizer = self._keras.optimizers.AdamW(
            RECIPE.learning_rate, **rates, epsilon=RECIPE.epsilon, global_clipnorm=RECIPE.max_gradient_norm
        )
        self._optimizer.build(self._model.trainable_variables)
        self._compiled = self._tf.function(self._step, jit_compile=self.with_xla, autograph=False)

    def _step(self, ids_BT: Any) -> Any:
        variables = self._model.trainable_variables
        with self._tf.GradientTape() as tape:
            loss = self._tf.reduce_mean(self._model(ids_BT, labels=ids_BT, use_cache=False, training=True).loss)
        self._optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    def step(self, ids_BT: np.ndarray) -> float:
        return float(self._compiled(self._tf.constant(ids_BT, self._tf.int32)))


class TransformersTFCompiled(TransformersTF):
    with_xla = True


CONTESTANTS: dict[str, type[Contestant]] = {
    "opt-zoo torch": OursTorch,
    "opt-zoo tf": OursTF,
    "opt-zoo flax": OursFlax,
    "transformers torch-sdpa": TransformersTorch,
    "transformers torch-eager": TransformersTorchEager,
    "transformers flax": TransformersFlax,
    "transformers tf": TransformersTF,
    "transformers tf-xla": TransformersTFCompiled,
}


def measure(job: Job) -> dict[str, Any]:
    """Seconds of a step, losses and memory, or `{"not_run": why}`."""
    contestant = CONTESTANTS[job.contestant](job)
    try:
        contestant.start()
    except (NotRunError, ImportError) as reason:
        return {"not_run": str(reason)}
    memory = PeakMemory()
    contestant.load()
    seconds, losses = [], []
    for ids_BT in batches(job):
        start = time.perf_counter()
        losses.append(contestant.step(ids_BT))
        seconds.append(time.perf_counter() - start)
    if not all(map(math.isfinite, losses)):
        raise ArithmeticError(f"losses {losses}")
    timed = seconds[job.warm_up :]
    return {
        "step_seconds": statistics.median(timed),
        "steps": timed,
        "compile_seconds": sum(seconds[: job.warm_up]),
        "losses": losses,
        "peak_bytes": memory.growth,
    }


def batches(job: Job) -> np.ndarray:
    """Random ids [steps, B, T] int64, the same for everybody."""
    with open(os.path.join(job.folder, "config.json"), encoding="utf-8") as file:
        vocab_size = json.load(file)["vocab_size"]
    shape = (job.warm_up + job.runs, job.batch, job.length)
    return np.random.default_rng(0).integers(FIRST_TOKEN_ID, vocab_size, shape)


if __name__ == "__main__":
    print(json.dumps(measure(Job(*json.loads(sys.argv[1])))))
