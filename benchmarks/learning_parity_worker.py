"""One training run of learning_parity.py: the losses of its steps, and the weights at its end.

    python -m benchmarks.learning_parity_worker JOB

JOB is a `Job` as a JSON list. Prints one JSON document; the weights go to `Job.output`, by canonical name.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conversion import write_checkpoint
from opt_core import OPTConfig, OPTTokenizer
from opt_core.batching import Batches, PackedDocuments
from opt_core.optimization import TrainingRecipe
from opt_core.schema import shapes, weights
from opt_core.synthetic import generator_of
from opt_zoo.embedded import embedded_folder

TEXT = Path(__file__).parent.parent / "examples" / "data" / "shakespeare.txt"
PREFIX = {"torch": "", "tf": "TF", "flax": "Flax"}


class Job(NamedTuple):
    backend: str
    dtype: str  # "float32", or for the truth "float64" in PyTorch
    model: str  # an embedded checkpoint: sizes and tokenizer
    activation: str
    weights: str  # the folder of the first weights
    steps: int
    batch_size: int
    length: int
    output: str  # an .npz


def recipe_of(steps: int) -> TrainingRecipe:
    """AdamW with warm-up, decay of the rate, weight decay and clipping."""
    return TrainingRecipe(learning_rate=1e-3, warmup_steps=max(steps // 10, 1), total_steps=steps)


def config_of(model: str, activation: str) -> OPTConfig:
    """The sizes of an embedded checkpoint, without dropout."""
    config = OPTConfig.from_json(embedded_folder(model))
    return config.replace(dropout=0.0, attention_dropout=0.0, activation_function=activation, torch_dtype="float32")


def write_first_weights(folder: Path, config: OPTConfig, moved_by_an_ulp: int | None = None) -> Path:
    """A checkpoint of weights as before any training; moved: each to the next float32 above or below, by that seed."""
    arrays = {}
    for weight in weights(config):
        shape = weight.shape(config)
        values = np.full(shape, 1.0 if weight.kind == "scale" else 0.0, np.float32)
        if weight.kind in ("linear", "embedding"):
            values = generator_of(weight.name, 0).normal(0, config.init_std, shape).astype(np.float32)
        if moved_by_an_ulp is not None:
            towards = generator_of(weight.name, moved_by_an_ulp).choice(np.float32([-np.inf, np.inf]), shape)
            values = np.where(values == 0, values, np.nextafter(values, towards))  # the next to zero is no rounding
        arrays[weight.name] = values
    write_checkpoint(folder, config, arrays)
    return folder


def batches_of(job: Job) -> Batches:
    """Speeches of Shakespeare's, packed."""
    tokenizer = OPTTokenizer.from_pretrained(embedded_folder(job.model))
    documents = [tokenizer(speech)["input_ids"] for speech in TEXT.read_text(encoding="utf-8").split("\n\n") if speech]
    return Batches(PackedDocuments(documents, job.length, drop_last=True), job.batch_size, seed=0)


def learn(job: Job) -> dict[str, Any]:
    """Losses and gradient norms of every step; writes the weights."""
    module = importlib.import_module(f"opt_{job.backend}")
    model = getattr(module, f"{PREFIX[job.backend]}OPTForCausalLM").from_pretrained(job.weights)
    if job.dtype == "float64":
        model.double()
    trainer = importlib.import_module(f"opt_{job.backend}.training").Trainer(model, recipe_of(job.steps))
    batches, losses, norms = batches_of(job), [], []
    for step in range(job.steps):
        losses.append(trainer.step(batches.at(step)))
        norms.append(trainer.gradient_norm)
    np.savez(job.output, **{name: to_numpy(model.weight(name)) for name in shapes(model.config)})
    return {"losses": losses, "gradient_norms": norms}


def to_numpy(weight) -> np.ndarray:
    """Of any framework's parameter; float64 stays."""
    return np.asarray(weight.detach() if hasattr(weight, "detach") else weight)


if __name__ == "__main__":
    print(json.dumps(learn(Job(*json.loads(sys.argv[1])))))
