"""A run of `opt_zoo.training_loop` over the processes that there are: arguments are a checkpoint, a folder and a mesh.

A step takes a moment, in which the test kills a process. Without a mesh it is one process, as anyone starts it.
"""

import sys
import time
from pathlib import Path

from train_sharded import RECIPE, batch_of, model_of

from opt_core.batching import Batches
from opt_core.errors import TrainingError
from opt_torch.sharding import init_mesh
from opt_torch.training import Trainer
from opt_zoo.training_loop import train

STEPS, SAVE_EVERY = 9, 2
LOST = 7  # the exit code of a process that was left alone


class Slow(Trainer):
    def step(self, batch) -> float:
        time.sleep(0.2)
        return super().step(batch)


def run(folder: Path, target: Path, mesh=None, trainer=Trainer):
    """The run, whole or what is left of it."""
    made = trainer(model_of(folder, mesh=mesh, double=False, dropout=0.0), RECIPE, seed=3)
    batches = Batches(examples(), 4, seed=1)
    validate = lambda: {"loss": made.evaluate(batches.at(0))}  # noqa: E731
    return train(made, batches, STEPS, target, validate=validate, validate_every=3, save_every=SAVE_EVERY)


def examples() -> list[dict]:
    rows = [batch_of(step) for step in range(4)]
    return [{name: x[row] for name, x in batch.items()} for batch in rows for row in range(4)]


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]), Path(sys.argv[2]), *(init_mesh(text, "cpu") for text in sys.argv[3:]), trainer=Slow)
    except TrainingError as error:
        print(error, file=sys.stderr)
        sys.exit(LOST)
