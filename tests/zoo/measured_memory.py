"""The peak memory of a generation or of training steps in PyTorch, in a process of its own; prints bytes.

    python measured_memory.py '{"config": {...}, "small": {...}, "mode": "training", "batch": 4, ...}'

The last tokens of `length` are new ones in a generation. Two steps: the moments come at the end of the first. With a
"mesh", such as "fsdp=2", this is one of its processes, and "config" and "small", the fields of what is measured and of
what runs before, are folders with weights.
"""

import json
import sys

import numpy as np
import torch

from opt_core import OPTConfig
from opt_core.optimization import TrainingRecipe
from opt_torch import OPTForCausalLM
from opt_torch.sharding import init_mesh
from opt_torch.training import Trainer
from opt_zoo.bench.memory import PeakMemory

NEW_TOKENS, STEPS = 3, 2


def run(model: OPTForCausalLM, job: dict, ids_BT: np.ndarray) -> None:
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
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    ids_BT = np.random.default_rng(0).integers(4, 97, (job["batch"], job["length"]))
    mesh = init_mesh(job["mesh"]) if "mesh" in job else None
    run(model_of(job["small"], mesh), job, ids_BT[:, :11])  # what libraries load at their first use
    peak = PeakMemory()
    run(model_of(job["config"], mesh), job, ids_BT)
    return peak.growth


def model_of(given: dict | str, mesh) -> OPTForCausalLM:
    if mesh is None:
        return OPTForCausalLM(OPTConfig(**given))
    return OPTForCausalLM.from_pretrained(given, device_mesh=mesh)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
