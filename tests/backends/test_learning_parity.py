"""The training of benchmarks/learning_parity.py in few steps: every backend within the benchmark's bound of float64."""

import numpy as np
import pytest

from benchmarks.learning_parity import judge, to_markdown, weight_distance
from benchmarks.learning_parity_worker import Job, config_of, learn, write_first_weights

STEPS = 15


@pytest.mark.slow
def test_every_backend_learns_what_float64_learns(backends, tmp_path):
    pytest.importorskip("torch", reason="the training in float64 is PyTorch's")
    config = config_of("opt-tiny", "gelu")
    folders = {"first": write_first_weights(tmp_path / "first", config)}
    folders["moved"] = write_first_weights(tmp_path / "moved", config, 1)
    runs = {"truth": ("torch", "float64", "first"), "torch": ("torch", "float32", "first")}
    runs |= {backend.name: (backend.name, "float32", "first") for backend in backends}
    runs["moved 1"] = ("torch", "float32", "moved")
    losses, weights = {}, {}
    for name, (backend, dtype, folder) in runs.items():
        output = str(tmp_path / f"{name}.npz")
        job = Job(backend, dtype, "opt-tiny", "gelu", str(folders[folder]), STEPS, 4, 32, output)
        losses[name] = learn(job)["losses"]
        with np.load(output) as arrays:
            weights[name] = {key: arrays[key].astype(np.float64) for key in arrays}
    distances = {
        name: weight_distance(of, weights["torch" if name == "moved 1" else "truth"]) for name, of in weights.items()
    }
    verdict = judge(losses, distances)
    assert losses["truth"][-1] < losses["truth"][0] - 0.5
    table = to_markdown({"losses": losses, "multiple": 4, **verdict})
    assert all(row["holds"] for row in verdict["backends"].values()), table


def test_a_backend_that_leaves_the_bound_is_found():
    truth = [5.0, 4.0, 3.0]
    near, far = ([loss + shift for loss in truth] for shift in (3e-3, 5e-3))
    losses = {"truth": truth, "torch": truth, "tf": near, "flax": far, "moved 1": [5.0, 4.001, 3.0]}
    weights = {"truth": 0.0, "torch": 1e-4, "tf": 5e-3, "flax": 1e-4, "moved 1": 1e-3}
    verdict = judge(losses, weights)
    assert verdict["loss_bound"] == pytest.approx(4e-3)
    assert {name: row["holds"] for name, row in verdict["backends"].items()} == {
        "torch": True, "tf": False, "flax": False
    }  # fmt: skip
