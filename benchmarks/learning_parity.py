"""Do three frameworks learn the same? The same training in each, held against one in float64.

    python benchmarks/learning_parity.py --activation gelu --output learning.json --plot learning.png

A model of the size of an embedded checkpoint learns Shakespeare from the same first weights and the same packed
batches, with AdamW, warm-up, weight decay and clipping, in float32 in each framework. The truth is the same training in
float64 (PyTorch's Trainer on the model in float64, whose forward pass the tests hold against the NumPy reference).

Two float32 trainings part by themselves: rounding grows as any small change of the weights does. How far is measured,
by trainings in PyTorch whose first weights are each moved to the next float32 above or below. The bound of a framework
is `MULTIPLE` times the largest distance of those trainings from the unmoved one, and at least what one forward pass may
be off. Exit code 1 where a framework exceeds
it. The last line is one JSON document.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.learning_parity_worker import Job, config_of, recipe_of, write_first_weights
from opt_core.config import ACTIVATIONS
from opt_core.optimization import TrainingRecipe
from opt_core.schema import parameter_count
from opt_zoo.arguments import some_of
from opt_zoo.backends import BACKENDS, installed_backends
from opt_zoo.bench.ceilings import available_processors
from opt_zoo.bench.turns import run_process
from opt_zoo.embedded import NAMES
from opt_zoo.environment import commit, describe_environment, processor_model

SCHEMA = "opt-zoo/learning-parity/1"
MULTIPLE = 4  # of a largest distance that a few trainings have shown, whose growth has chance in it
FLOOR = 64 * 2.0**-24  # of a loss: what a float32 forward pass may be off from float64 (README, parity)
MOVED = (1, 2)  # seeds
KEY_BIASES = ".k_proj.bias"


def main() -> int:
    options = parse_options()
    with tempfile.TemporaryDirectory() as parent:
        runs = dict(run_all(options, Path(parent)))
    document = {
        "schema": SCHEMA,
        "command": f"python {shlex.join(sys.argv)}",
        "commit": commit(),
        "environment": describe_environment([BACKENDS[name] for name in installed_backends()]),
        "processor": processor_model(),
        "processors": available_processors(),
        "model": options.model,
        "activation": options.activation,
        "parameters": parameter_count(config_of(options.model, options.activation)),
        "recipe": recipe_of(options.steps).to_dict(),
        "batch": [options.batch_size, options.length],
        "multiple": MULTIPLE,
        **compare(runs),
    }
    if options.output:
        options.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.plot:
        write_plot(document, options.plot)
    print(to_markdown(document))
    print(json.dumps(document, allow_nan=False))
    return 0 if all(row["holds"] for row in document["backends"].values()) else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=NAMES, default="opt-tiny", help="whose sizes and tokenizer")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="relu", help="relu is OPT's, gelu has no kink")
    parser.add_argument("--backends", type=some_of(BACKENDS), default=list(BACKENDS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--output", type=Path, help="write the JSON document here")
    parser.add_argument("--plot", type=Path, help="write the picture here")
    return parser.parse_args()


# -- runs -------------------------------------------------------------------------------------------------------------


def run_all(options: argparse.Namespace, parent: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of each run, and its losses, gradient norms and last weights."""
    of = (options.model, options.activation)
    config = config_of(*of)
    first = write_first_weights(parent / "first", config)
    moved = {f"moved {seed}": write_first_weights(parent / f"moved {seed}", config, seed) for seed in MOVED}
    names = {"truth": ("torch", "float64", first)}
    names |= {backend: (backend, "float32", first) for backend in ("torch", *options.backends)}
    names |= {name: ("torch", "float32", folder) for name, folder in moved.items()}
    for name, (backend, dtype, folder) in names.items():
        output = parent / f"{name}.npz"
        sizes = (options.steps, options.batch_size, options.length)
        job = Job(backend, dtype, *of, str(folder), *sizes, str(output))
        run = run_process("benchmarks.learning_parity_worker", [json.dumps(job)], "cpu", 3600)
        with np.load(output) as arrays:
            run["weights"] = {key: arrays[key].astype(np.float64) for key in arrays}
        print(f"{name}: loss {run['losses'][0]:.4f} to {run['losses'][-1]:.4f}", file=sys.stderr, flush=True)
        yield name, run


# -- comparison -------------------------------------------------------------------------------------------------------


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Distances from the truth of each framework; those of moved trainings from the unmoved one, and the bounds."""
    moved = [name for name in runs if name.startswith("moved")]
    of = {name: run["weights"] for name, run in runs.items()}
    weights = {name: weight_distance(of[name], of["torch" if name in moved else "truth"]) for name in runs}
    document = {
        "losses": {name: run["losses"] for name, run in runs.items()},
        "clipped_steps": int(np.sum(np.array(runs["truth"]["gradient_norms"]) > TrainingRecipe().max_gradient_norm)),
    }
    return document | judge(document["losses"], weights)


def judge(losses: dict[str, list[float]], weights: dict[str, float]) -> dict[str, Any]:
    """The bounds that follow from the moved trainings, and whether each framework keeps them."""
    arrays = {name: np.array(values) for name, values in losses.items()}
    moved = [name for name in weights if name.startswith("moved")]
    drift = max(float(np.abs(arrays[name] - arrays["torch"]).max()) for name in moved)
    loss_bound = max(MULTIPLE * drift, FLOOR * float(arrays["truth"].max()))
    weights_bound = MULTIPLE * max(weights[name] for name in moved)
    backends = {}
    for name in [name for name in BACKENDS if name in arrays]:
        difference = np.abs(arrays[name] - arrays["truth"])
        backends[name] = {
            "loss_difference": float(difference.max()),
            "mean_loss_difference": float(difference.mean()),
            "differences_by_step": {str(step): float(difference[:step].max()) for step in steps_shown(len(difference))},
            "weights": weights[name],
            "holds": bool(difference.max() <= loss_bound and weights[name] <= weights_bound),
        }
    return {"loss_bound": loss_bound, "weights_bound": weights_bound, "backends": backends}


def steps_shown(steps: int) -> list[int]:
    return [step for step in (1, 10, 25, 50, 100, 200) if step < steps] + [steps]


def weight_distance(weights: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> float:
    """The largest relative distance of a weight, over all but the keys' biases.

    Those shift all scores of a query alike, which a softmax does not see: their gradient is rounding alone, which
    AdamW divides by its own size, so that they walk at random, in float64 too, and change nothing.
    """
    return max(
        float(np.linalg.norm(weights[name] - want) / np.linalg.norm(want))
        for name, want in truth.items()
        if not name.endswith(KEY_BIASES) and np.any(want)
    )


# -- tables and pictures ----------------------------------------------------------------------------------------------


def to_markdown(document: dict[str, Any]) -> str:
    """The largest difference of a loss from float64 so far, the bound of all; the largest distance of a weight."""
    losses, backends = document["losses"], document["backends"]
    steps = steps_shown(len(losses["truth"]))
    header = ["", *(f"to step {step}" for step in steps), "last loss", "last weights"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    titles = {"torch": "PyTorch", "tf": "TensorFlow", "flax": "Flax"}
    for name, row in backends.items():
        shown = [f"{row['differences_by_step'][str(step)]:.1e}" for step in steps]
        lines.append(f"| {titles[name]} | {' | '.join(shown)} | {losses[name][-1]:.6f} | {row['weights']:.1e} |")
    moved = np.max([np.abs(np.subtract(losses[n], losses["torch"])) for n in losses if n.startswith("moved")], axis=0)
    shown = [f"{moved[:step].max():.1e}" for step in steps]
    drift = document["weights_bound"] / document["multiple"]
    lines.append(f"| PyTorch, moved by an ulp, from unmoved | {' | '.join(shown)} | | {drift:.1e} |")
    empty = " | " * (len(steps) - 1)
    lines.append(f"| bound |{empty} {document['loss_bound']:.1e} | | {document['weights_bound']:.1e} |")
    lines.append(f"| float64 |{empty} | {losses['truth'][-1]:.6f} | |")
    return "\n".join(lines)


def write_plot(document: dict[str, Any], path: Path) -> None:
    """Above the losses, below their differences from float64 and the bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    losses = {name: np.array(values) for name, values in document["losses"].items()}
    truth = losses["truth"]
    styles = dict(zip(("truth", *BACKENDS), ("-", "--", "-.", ":"), strict=True))
    for name in [name for name in styles if name in losses]:
        label = "float64" if name == "truth" else name
        above.plot(losses[name], styles[name], label=label, lw=3 if name == "truth" else 1.5)
        if name != "truth":
            below.plot(np.maximum(np.abs(losses[name] - truth), 1e-9), label=name, lw=1)
    for name in [name for name in losses if name.startswith("moved")]:
        label = "first weights moved by an ulp, from unmoved" if name == "moved 1" else None
        below.plot(np.maximum(np.abs(losses[name] - losses["torch"]), 1e-9), color="0.7", lw=0.8, label=label, zorder=0)
    bound = f"bound: {document['multiple']} times the largest of those"
    below.axhline(document["loss_bound"], color="k", lw=1, label=bound)
    above.set(ylabel="loss", title=f"{document['model']} with {document['activation']}, float32")
    below.set(ylabel="|loss - loss in float64|", xlabel="step", yscale="log")
    above.legend()
    below.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
