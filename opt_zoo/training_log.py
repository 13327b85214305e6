"""What a training run leaves to be read: a line for each step and validation, a picture, a sentence."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opt_core.small_files import write_whole

LOG, PLOT = "log.jsonl", "training.png"
Metrics = dict[str, float]


class Result(NamedTuple):
    """What a run has come to."""

    losses: list[float]  # of every step from 0, those before an interruption among them
    validations: list[tuple[int, Metrics]]  # after so many steps; the first is that before training
    seconds: float  # of this process
    resumed_from: int | None  # steps done before this process


class Log:
    """`log.jsonl`: what happened until `steps` steps were done stays, what came after is done again; None: all.

    Of several processes one `writes`; the others know the same lines.
    """

    def __init__(self, path: Path, steps: int | None, *, writes: bool = True):
        self._path, self._writes = path, writes
        self._lines = [] if steps is None else [line for line in read_log(path) if belongs(line, steps)]
        if writes:
            write_whole(path, "".join(json.dumps(line) + "\n" for line in self._lines))

    def write(self, **line: Any) -> dict[str, Any]:
        self._lines.append(line)
        if self._writes:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return line

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self._lines if "loss" in line]

    @property
    def validations(self) -> list[tuple[int, Metrics]]:
        return [(line["step"], line["validation"]) for line in self._lines if "validation" in line]


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Its lines, but for one that a killed process left unfinished."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def belongs(line: dict[str, Any], steps: int) -> bool:
    """Whether a line is of the first `steps` steps: a step's number is from 0, a validation's is of steps done."""
    return line["step"] < steps if "loss" in line else line["step"] <= steps


def spelled(metrics: Metrics) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())


def summary(result: Result, metric: str) -> str:
    """One sentence: the metric before and after."""
    (_, before), (steps, after) = result.validations[0], result.validations[-1]
    name = metric.replace("_", " ")
    return f"The validation {name} went from {before[metric]:.4g} to {after[metric]:.4g} in {steps} steps."


def write_plot(result: Result, path: str | Path) -> None:
    """A PNG: the loss of each step with its running mean, and each validation metric below. Imports matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(result.validations[0][1]) if result.validations else []
    figure = Figure(figsize=(8, 3 * (1 + len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    first, *others = figure.subplots(1 + len(names), 1, sharex=True, squeeze=False)[:, 0]
    first.plot(result.losses, color="C0", alpha=0.3, linewidth=0.8)
    span = max(1, len(result.losses) // 25)
    means = np.convolve(result.losses, np.ones(span) / span, "valid")
    first.plot(np.arange(len(means)) + span - 1, means, color="C0", label=f"mean of {span} steps")
    first.set_ylabel("training loss")
    first.legend()
    for panel, name in zip(others, names, strict=True):
        panel.plot(
            *zip(*((step, metrics[name]) for step, metrics in result.validations), strict=True), "o-", color="C1"
        )
        panel.set_ylabel(f"validation {name.replace('_', ' ')}")
    figure.axes[-1].set_xlabel("steps")
    figure.savefig(path, format="png", dpi=120)
