"""The peak memory of a generation or of training steps in PyTorch, in a process of its own; prints bytes.

    python measured_memory.py '{"config": {...}, "mode": "training", "dtype": "float32", "batch": 4, "length": 256}'

The last tokens of `length` are new ones in a generation. Two steps: the moments come at the end of the first.
"""

import json
import sys

import numpy as np
import torch

from opt_core import OPTConfig
from opt_core.optimization import TrainingRecipe
from opt_torch import OPTForCausalLM
from opt_torch.training import Trainer
from opt_zoo.bench.memory import PeakMemory

NEW_TOKENS, STEPS = 3, 2


def run(config: OPTConfig, job: dict, ids_BT: np.ndarray) -> None:
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    model = OPTForCausalLM(config)
    if job["mode"] == "inference":
        model.eval().generate(ids_BT[:, :-NEW_TOKENS], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        return
    if job.get("recompute"):
        model.gradient_checkpointing_enable()
    trainer = Trainer(model, TrainingRecipe(), accumulate=job.get("accumulate", 1))
    compute_dtype = job.get("compute_dtype")
    for _ in range(STEPS):
        with torch.autocast("cpu", getattr(torch, compute_dtype or "bfloat16"), enabled=compute_dtype is not None):
            trainer.step({"input_ids": ids_BT, "labels": ids_BT})


def main(job: dict) -> int | None:
    config = OPTConfig(**job["config"])
    ids_BT = np.random.default_rng(0).integers(4, 97, (job["batch"], job["length"]))
    small = config.replace(vocab_size=97, hidden_size=32, num_attention_heads=2, ffn_dim=41, num_hidden_layers=1)
    run(small, job, ids_BT[:, :11])  # what libraries load at their first use
    peak = PeakMemory()
    run(config, job, ids_BT)
    return peak.growth


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
