"""A Trainer without a framework or a model: weights that follow the batches, noise like dropout, a checkpoint's files.

`python tests/zoo/fake_trainer.py FOLDER STEPS` trains it, slowly, so that a test can kill it at any moment.
"""

import sys
import time
from pathlib import Path

import numpy as np

from opt_core.batching import Batches
from opt_core.optimization import TrainingRecipe
from opt_zoo.training_loop import train


class FakeTrainer:
    """Each step moves the weights towards the mean of the batch, with noise from (seed, step). It is one process."""

    process_index = 0

    def agree(self, number: int) -> int:
        return number

    def wait_for_all(self) -> None:
        pass

    def __init__(self, recipe: TrainingRecipe | None = None, seed: int = 0, pause: float = 0.0, start=None):
        self.recipe, self.seed, self.accumulate, self.pause = recipe or TrainingRecipe(), seed, 1, pause
        self.step_count, self.gradient_norm = 0, 0.0
        self.weights = np.zeros(3) if start is None else start

    def step(self, batch) -> float:
        time.sleep(self.pause)
        noise = np.random.Generator(np.random.Philox(key=self.seed, counter=self.step_count)).random(3)
        gradient = self.weights - batch["input_ids"].mean() - noise
        self.gradient_norm = float(np.linalg.norm(gradient))
        self.weights = self.weights - self.recipe.learning_rate_at(self.step_count) * gradient
        self.step_count += 1
        return float((gradient**2).mean())

    def save(self, folder) -> None:
        folder.mkdir()
        np.save(folder / "weights.npy", self.weights)
        time.sleep(self.pause)
        (folder / "state.txt").write_text(str(self.step_count))

    def restore(self, folder) -> None:
        self.weights = np.load(folder / "weights.npy")
        self.step_count = int((folder / "state.txt").read_text())


def examples(count: int = 13) -> list[dict[str, np.ndarray]]:
    return [{"input_ids": np.full(5, number)} for number in range(count)]


def run(
    folder,
    steps: int,
    *,
    pause: float = 0.0,
    seed: int = 0,
    recipe: TrainingRecipe | None = None,
    start=None,
    **options,
):
    trainer = FakeTrainer(recipe or TrainingRecipe(learning_rate=0.1), seed, pause, start)
    batches = options.pop("batches", None) or Batches(examples(), 3, seed=seed)
    usual = dict(validate=lambda: {"distance": np.abs(trainer.weights).sum()}, validate_every=5, save_every=3)
    return train(trainer, batches, steps, folder, **{**usual, **options}), trainer


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), pause=0.005)
