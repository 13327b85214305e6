"""A training run: steps, validation, checkpoints, resumption, a log and a picture, around the Trainer of any backend.

A run lives in a folder: `run.json` says what it is, `log.jsonl` has a line for each step and validation, `step-000200`
is a checkpoint (weights, optimizer, step), `training.png` the curves. A process may be killed at any moment: started
again with the same call, the run goes on from its newest whole checkpoint with the losses of an unbroken one. Whole is
what has its name: a checkpoint is written beside it, brought to the disk, and renamed. Gradients are the Trainer's
work, batches those of `opt_core.batching`.

Several processes that train one model all call `train`, with the same arguments: the first of them writes whatever lies
in the folder and decides where to go on, the others take part in steps, validation and the gathering of weights. So a
run goes on with any number of processes.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from conversion.staging import sync_path
from opt_core.batching import Batches
from opt_core.errors import InputError, TrainingError, raise_if
from opt_core.small_files import write_whole
from opt_zoo.training_log import LOG, PLOT, Log, Metrics, Result, spelled, write_plot

RUN = "run.json"
_CHECKPOINT = re.compile(r"step-(\d{6,})")
_NONE, _FAILED = -1, -2  # what processes tell each other in place of a number of steps


class Trainer(Protocol):
    """What `training.Trainer` of every backend has."""

    @property
    def step_count(self) -> int: ...
    @property
    def gradient_norm(self) -> float: ...
    @property
    def process_index(self) -> int: ...  # among those that train this model; 0 for one alone
    def agree(self, number: int) -> int: ...  # the number that process 0 gave, on each of them
    def wait_for_all(self) -> None: ...  # until each of them calls it
    def step(self, batch: dict[str, np.ndarray]) -> float: ...
    def save(self, folder: Path) -> Any: ...
    def restore(self, folder: Path) -> Any: ...


def train(
    trainer: Trainer,
    batches: Batches,
    steps: int,
    folder: str | Path,
    *,
    validate: Callable[[], Metrics] | None = None,
    validate_every: int = 100,
    save_every: int = 100,
    keep: int = 2,
    identity: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Result:
    """Trains until `steps` steps are done, from the newest checkpoint in `folder` if it has one.

    Args:
        validate: measures on held-out data, such as {"perplexity": 31.5}; called before the first step, every
            `validate_every` steps, and at the end.
        keep: checkpoints that stay; older ones are deleted.
        identity: what else makes this run another one than the next, as JSON: the data, the model it began from. The
            recipe and the seed of the trainer and the order of the batches are added.

    Raises:
        InputError: the folder has a run that differs, each difference named; numbers below 1.
        TrainingError: of several processes, another one failed or is gone.
    """
    counts = dict(steps=steps, validate_every=validate_every, save_every=save_every, keep=keep)
    problems = [f"{name}: expected at least 1, got {count}" for name, count in counts.items() if count < 1]
    raise_if(InputError, "train", problems)
    folder, is_first = Path(folder), trainer.process_index == 0
    console = console or Console(stderr=True, highlight=False, emoji=False, quiet=not is_first)
    resumed_from = resume(trainer, folder, run_identity(trainer, batches, identity or {}))
    log, start = Log(folder / LOG, resumed_from, writes=is_first), time.perf_counter()

    def validated() -> None:
        if validate is not None:
            metrics = {name: float(value) for name, value in validate().items()}
            log.write(step=trainer.step_count, validation=metrics)
            console.print(f"step {trainer.step_count}: {spelled(metrics)}")

    if resumed_from is None:
        validated()
        save(trainer, folder, keep)  # what began at random does not begin otherwise after a kill
    else:
        console.print(f"going on after step {resumed_from}")
    with step_bar(console, steps, trainer.step_count) as show:
        for done in range(trainer.step_count + 1, steps + 1):
            show(take_step(trainer, batches, log))
            if done % validate_every == 0 or done == steps:
                validated()  # before the checkpoint, which so has it in its log
            if done % save_every == 0 or done == steps:
                save(trainer, folder, keep)
    result = Result(log.losses, log.validations, time.perf_counter() - start, resumed_from)
    if is_first:
        write_plot(result, folder / PLOT)
    trainer.wait_for_all()
    return result


def take_step(trainer: Trainer, batches: Batches, log: Log) -> dict[str, Any]:
    """One step, and its line in the log."""
    start, batch = time.perf_counter(), batches.at(trainer.step_count)
    line = {"step": trainer.step_count, "loss": trainer.step(batch), "gradient_norm": float(trainer.gradient_norm)}
    return log.write(**line, tokens=real_tokens(batch), seconds=time.perf_counter() - start)


def real_tokens(batch: Mapping[str, np.ndarray]) -> int:
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].size


# -- which run a folder has -------------------------------------------------------------------------------------------


def run_identity(trainer: Any, batches: Batches, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to go on, as JSON."""
    recipe = getattr(trainer, "recipe", None)
    fields = dataclasses.asdict(recipe) if dataclasses.is_dataclass(recipe) else {}  # type: ignore[arg-type]
    whole = {
        "recipe": fields,
        "seed": getattr(trainer, "seed", None),
        "accumulate": getattr(trainer, "accumulate", None),
        "batches": batches.describe(),
        **identity,
    }
    return json.loads(json.dumps(whole))


def check_or_begin(folder: Path, identity: dict[str, Any]) -> None:
    """Writes `run.json`; where there is one, raises an InputError with all that differs."""
    path = folder / RUN
    if not path.exists():
        others = sorted(name.name for name in folder.iterdir()) if folder.exists() else []
        if others and not all(name.startswith(f".{RUN}") for name in others):
            raise InputError(str(folder), [f"expected an empty folder or one of a run, got {', '.join(others[:5])}"])
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(identity, indent=1) + "\n")
        return
    theirs = flat(json.loads(path.read_text(encoding="utf-8")))
    ours = flat(identity)
    names = list(dict.fromkeys([*ours, *theirs]))
    missing = "nothing"
    problems = [
        f"{name}: this run has {ours.get(name, missing)!r}, the one in the folder {theirs.get(name, missing)!r}"
        for name in names
        if ours.get(name, missing) != theirs.get(name, missing)
    ]
    raise_if(InputError, f"{folder} holds another run", problems)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of objects in objects, under names with dots."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for k, v in value.items() for key, leaf in flat(v, f"{name}.{k}".lstrip(".")).items()}


# -- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a run, oldest first."""
    named = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match)


def resume(trainer: Trainer, folder: Path, identity: dict[str, Any]) -> int | None:
    """Restores the newest checkpoint of this run and returns its steps; None where there is none."""

    def newest() -> int:
        check_or_begin(folder, identity)
        for leftover in folder.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        found = checkpoints(folder)
        return found[-1][0] if found else _NONE

    steps = by_the_first(trainer, newest)
    if steps == _NONE:
        return None
    trainer.restore(path := checkpoint_path(folder, steps))
    if trainer.step_count != steps:
        raise InputError(str(path), [f"step: expected {steps}, as the folder is called, got {trainer.step_count}"])
    return steps


def save(trainer: Trainer, folder: Path, keep: int) -> None:
    """Writes `step-NNNNNN`, which has its name only when all of it is on the disk; deletes all but `keep`."""
    target = checkpoint_path(folder, trainer.step_count)
    partial = target.with_name(f"{target.name}.tmp")

    def publish() -> int:
        for path in [*partial.rglob("*"), partial]:
            sync_path(path)
        os.rename(partial, target)
        sync_path(folder)
        for _, old in checkpoints(folder)[:-keep]:
            os.rename(old, gone := old.with_name(f"{old.name}.tmp"))  # a half deleted one has no name of a whole one
            shutil.rmtree(gone)
        return 0

    if trainer.process_index == 0:
        shutil.rmtree(partial, ignore_errors=True)
    trainer.save(partial)
    by_the_first(trainer, publish)


def checkpoint_path(folder: Path, steps: int) -> Path:
    return folder / f"step-{steps:06d}"


def by_the_first(trainer: Trainer, act: Callable[[], int]) -> int:
    """What `act` returns on process 0, which alone calls it; no process goes on before, nor after an error there."""
    number, error = 0, None
    if trainer.process_index == 0:
        try:
            number = act()
        except Exception as caught:
            number, error = _FAILED, caught
    agreed = trainer.agree(number)
    if error is not None:
        raise error
    if agreed == _FAILED:
        raise TrainingError(f"process {trainer.process_index}", ["process 0 failed, and says why"])
    return agreed


# -- the bar ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def step_bar(console: Console, steps: int, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar with loss, speed and time left, on a terminal. The function it gives takes the line of each step."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}, {task.fields[speed]:,.0f} tokens/s, left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps, completed=done, loss=float("nan"), speed=0.0)
        yield lambda line: progress.update(task, advance=1, loss=line["loss"], speed=line["tokens"] / line["seconds"])
