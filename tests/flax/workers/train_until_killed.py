"""A run of `opt_zoo.training_loop` on the devices that there are: arguments are a checkpoint, a folder and a mesh.

A step takes a moment, in which the test kills a process. It is 2 devices of one process, or one of each of several.
"""

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__" and int(os.environ.get("WORLD_SIZE", 1)) == 1:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

from train_on_mesh import RECIPE, Trainer, batch_of, model_of

from opt_core.batching import Batches
from opt_core.errors import TrainingError
from opt_flax.sharding import init_mesh
from opt_zoo.training_log import Result
from opt_zoo.training_loop import train

STEPS, SAVE_EVERY = 9, 2
LOST = 7  # the exit code of a process that was left alone


class Slow(Trainer):
    def step(self, batch) -> float:
        time.sleep(0.2)
        return super().step(batch)


def run(folder: Path, target: Path, mesh=None, trainer=Trainer) -> Result:
    """The run, whole or what is left of it."""
    made = trainer(model_of(folder, mesh=mesh), RECIPE, seed=3)
    return train(made, Batches(examples(), 4, seed=1), STEPS, target, save_every=SAVE_EVERY)


def examples() -> list[dict]:
    rows = [batch_of(step) for step in range(4)]
    return [{name: x[row] for name, x in batch.items()} for batch in rows for row in range(4)]


if __name__ == "__main__":
    folder, target, text = sys.argv[1:]
    try:
        run(Path(folder), Path(target), init_mesh(text), Slow)
    except TrainingError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(LOST)
