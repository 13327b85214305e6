"""The three backends behind the same few calls, in NumPy; and the models, masks and bounds that tests share."""

import importlib
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import ml_dtypes
import numpy as np

from conversion import write_checkpoint
from opt_core import OPTConfig
from opt_core.reference import Reference
from opt_core.schema import kept_by_pruning, published_name, shapes, weights
from opt_core.synthetic import random_tensors

# Distinct primes, but for the width, which is heads x head size.
SIZES = dict(
    vocab_size=97,
    hidden_size=5 * 7,
    num_hidden_layers=3,
    ffn_dim=53,
    num_attention_heads=5,
    max_position_embeddings=41,
    dropout=0.0,
)
VARIANTS = {
    "pre-norm": {},
    "350m style": dict(do_layer_norm_before=False, word_embed_proj_dim=19),
    "pre-norm with projections": dict(word_embed_proj_dim=19),
    "post-norm without projections": dict(do_layer_norm_before=False),
    "no final norm": dict(_remove_final_layer_norm=True),
    "no biases": dict(enable_bias=False),
    "norms without weights": dict(layer_norm_elementwise_affine=False),
    "galactica style": dict(enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"),
    "untied head": dict(tie_word_embeddings=False),
    "gelu": dict(activation_function="gelu"),
    "gelu_new": dict(activation_function="gelu_new"),
    "silu": dict(activation_function="silu"),
    "one head": dict(num_attention_heads=1),
    "no layers": dict(num_hidden_layers=0),
    "pad id 0": dict(pad_token_id=0),
    "no pad id": dict(pad_token_id=None),
}
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
BOUND = {"float32": 64, "float16": 16, "bfloat16": 16}  # worst row, in units of roundoff
NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}

PRUNED_HEADS = {0: [1, 4], 2: [0, 2, 3]}  # of five; other layers keep all

BATCH, LENGTH = 4, 13
MASKS = {
    "none": None,
    "left": ["0001111111111", "1111111111111", "0000000000001", "0000011111111"],
    "right": ["1111111111000", "1111111111111", "1000000000000", "1111111100000"],
    "holes": ["1011011100110", "0110101011001", "1111111111111", "0100000000010"],
    "an empty row": ["0001111111111", "0000000000000", "1111100000000", "1011011100110"],
}


def mask_named(name: str) -> np.ndarray | None:
    rows = MASKS[name]
    return None if rows is None else np.array([[int(c) for c in row] for row in rows])


def token_ids(config: OPTConfig, batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """Random ids [batch, length], none of them a special one."""
    return np.random.default_rng(seed).integers(4, config.vocab_size, (batch, length))


def config_of(variant: str = "pre-norm", **changes) -> OPTConfig:
    return OPTConfig(**{**SIZES, **VARIANTS[variant], **changes})


def rounded_weights(config: OPTConfig, task: str = "causal-lm", dtype: str = "float32") -> dict[str, np.ndarray]:
    return {name: w.astype(NUMPY_DTYPES[dtype]) for name, w in random_tensors(config, task)}


def pruned_tensors(
    tensors: dict[str, np.ndarray], before: OPTConfig, after: OPTConfig, task: str = "causal-lm"
) -> dict[str, np.ndarray]:
    """The weights that are left when heads go."""
    kept = {}
    for weight in weights(before, task):
        place = kept_by_pruning(weight, before, after)
        whole = tensors[weight.name]
        kept[weight.name] = whole if place is None else np.take(whole, place[1], axis=place[0])
    return kept


def save_random(folder, config: OPTConfig, task: str = "causal-lm", dtype: str = "float32", **options) -> Path:
    """A checkpoint of random weights, rounded to `dtype`, in `folder`."""
    arrays = rounded_weights(config, task, dtype)
    tensors = {name: lambda name=name: arrays[name] for name in arrays}
    write_checkpoint(Path(folder), config, tensors, task=task, dtype=dtype, overwrite=True, **options)
    return Path(folder)


def shift_data(folder, shift: int) -> Path:
    """Rewrites a checkpoint of one file so that its data start `shift` bytes (8, 16, ...) beyond a multiple of 64."""
    path = Path(folder) / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length].rstrip(b" "), content[8 + length :]
    header += b" " * ((shift - 8 - len(header)) % 64)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return Path(folder)


def reference_of(config: OPTConfig, task: str = "causal-lm", dtype: str = "float32") -> Reference:
    return Reference(config, rounded_weights(config, task, dtype))


def worst_row(got: np.ndarray, truth: np.ndarray) -> float:
    """The largest relative error of a row (last axis); a row that must be zero counts as infinite unless it is."""
    error, size = np.linalg.norm(got - truth, axis=-1), np.linalg.norm(truth, axis=-1)
    return float(np.where(size > 0, error / np.where(size > 0, size, 1), np.where(error == 0, 0, np.inf)).max())


def backends_asked_for(config) -> list[str]:
    """The names in `--backends`."""
    return config.getoption("--backends").split(",")


class Backend:
    """One framework. `prefix` is that of its class names."""

    CLASSES: ClassVar = {
        "base": "OPTModel",
        "causal-lm": "OPTForCausalLM",
        "sequence-classification": "OPTForSequenceClassification",
        "question-answering": "OPTForQuestionAnswering",
    }

    def __init__(self, name: str, prefix: str):
        self.name, self.prefix = name, prefix
        self.module = importlib.import_module(f"opt_{name}")

    def __repr__(self) -> str:
        return self.name

    def model_class(self, task: str = "causal-lm"):
        return getattr(self.module, self.prefix + self.CLASSES[task])

    def random_model(self, config: OPTConfig, task: str = "causal-lm", dtype: str = "float32", **options):
        """A model of `random_tensors`, by way of a checkpoint on disk."""
        with tempfile.TemporaryDirectory() as folder:
            save_random(folder, config, task, dtype)
            return self.model_class(task).from_pretrained(folder, dtype="auto", **options)

    def numpy(self, x) -> np.ndarray:
        """Float64 of an output; integers stay."""
        x = np.asarray(x)
        return x if np.issubdtype(x.dtype, np.integer) or x.dtype == bool else x.astype(np.float64)

    def array(self, x):
        """The framework's own array of a NumPy one."""
        raise NotImplementedError

    def train(self, model):
        """Calls of the returned function run in training mode."""
        raise NotImplementedError

    def loss_and_gradients(self, model, task: str = "causal-lm", **inputs) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of a call, and its gradient for every canonical name."""
        raise NotImplementedError

    def dtype_of(self, x) -> str:
        return str(np.asarray(x).dtype)


class TorchBackend(Backend):
    def __init__(self):
        super().__init__("torch", "")
        self.torch = importlib.import_module("torch")

    def numpy(self, x) -> np.ndarray:
        x = x.detach()
        return (x.double() if x.is_floating_point() else x).numpy()

    def array(self, x):
        return self.torch.as_tensor(x)

    def train(self, model):
        return model.train()

    def loss_and_gradients(self, model, task="causal-lm", **inputs):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return float(loss), {name: self.numpy(model.weight(name).grad) for name in shapes(model.config, task)}

    def dtype_of(self, x) -> str:
        return str(x.dtype).removeprefix("torch.")


class TFBackend(Backend):
    def __init__(self):
        super().__init__("tf", "TF")
        self.tf = importlib.import_module("tensorflow")

    def array(self, x):
        return self.tf.constant(x)

    def train(self, model):
        return lambda *args, **kwargs: model(*args, training=True, **kwargs)

    def loss_and_gradients(self, model, task="causal-lm", **inputs):
        names = list(shapes(model.config, task))
        variables = [getattr(model.weight(name), "value", model.weight(name)) for name in names]
        with self.tf.GradientTape() as tape:
            loss = model(**inputs).loss
        gradients = [self.tf.convert_to_tensor(g) for g in tape.gradient(loss, variables)]
        return float(loss), {name: self.numpy(g) for name, g in zip(names, gradients, strict=True)}

    def dtype_of(self, x) -> str:
        return getattr(x.dtype, "name", x.dtype)  # a Keras variable says a string


class FlaxBackend(Backend):
    def __init__(self):
        super().__init__("flax", "Flax")
        self.jnp = importlib.import_module("jax.numpy")
        self.nnx = importlib.import_module("flax.nnx")

    def array(self, x):
        return self.jnp.asarray(x)

    def train(self, model):
        model.train()
        return model

    def loss_and_gradients(self, model, task="causal-lm", **inputs):
        loss, gradients = self.nnx.value_and_grad(lambda m: m(**inputs).loss)(model)
        names = shapes(model.config, task)
        return float(loss), {name: self.numpy(_leaf(gradients, published_name(name, task))) for name in names}


def _leaf(tree, name: str):
    for key in name.split("."):
        tree = tree[int(key) if key.isdigit() else key]
    return getattr(tree, "value", tree)


@lru_cache
def load_backend(name: str) -> Backend:
    return {"torch": TorchBackend, "tf": TFBackend, "flax": FlaxBackend}[name]()
