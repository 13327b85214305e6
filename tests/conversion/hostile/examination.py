"""What a user does with a checkpoint of unknown origin: opens it, checks it, reads every tensor, converts it."""

from pathlib import Path

import numpy as np

from conversion import Checkpoint, open_checkpoint, write_checkpoint


def read_everything(checkpoint: Checkpoint) -> None:
    """Reads each tensor once, to its last byte; what it is must be what was declared."""
    for name, shape in checkpoint.shapes.items():
        array = checkpoint.read(name)
        assert (array.shape, str(array.dtype)) == (shape, checkpoint.dtypes[name]), name
        np.bitwise_or.reduce(np.ascontiguousarray(array).view(np.uint8), axis=None)


def examine(source: Path, **opening) -> None:
    """Opens, checks and reads."""
    with open_checkpoint(source, **opening) as checkpoint:
        checkpoint.check()
        read_everything(checkpoint)


def convert(source: Path, target: Path, *, opening: dict | None = None, **writing) -> None:
    """Examines, then writes it in another format."""
    with open_checkpoint(source, **(opening or {})) as checkpoint:
        checkpoint.check()
        read_everything(checkpoint)
        other = "torch-bin" if checkpoint.format == "safetensors" else "safetensors"
        write_checkpoint(target, checkpoint.config, checkpoint, task=checkpoint.task, **{"format": other, **writing})
