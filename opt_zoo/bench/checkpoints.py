"""The checkpoints that contestants load: copies of the source in the layout of each, in the dtype that is measured."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from conversion import Checkpoint, open_checkpoint, resolve, write_checkpoint
from opt_core.config import OPTConfig
from opt_core.presets import PRESETS
from opt_core.schema import weights
from opt_core.synthetic import random_tensor


def config_of(source: str) -> OPTConfig:
    """That of a preset or of a checkpoint."""
    if source in PRESETS:
        return OPTConfig.preset(source)
    with open_checkpoint(resolve(source)) as checkpoint:
        return checkpoint.config


def write_copies(source: str, parent: Path, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], Path]:
    """Writes a checkpoint, or random weights of a preset, in each format and dtype of `wanted`; returns the folders."""
    folders = {}
    with contextlib.ExitStack() as stack:
        tensors: Checkpoint | dict[str, Callable[[], np.ndarray]]
        if source in PRESETS:
            config, task = OPTConfig.preset(source), "causal-lm"
            tensors = {weight.name: functools.partial(random_tensor, weight, config) for weight in weights(config)}
        else:
            tensors = stack.enter_context(open_checkpoint(resolve(source)))
            config, task = tensors.config, tensors.task
        for format, dtype in sorted(wanted):
            folders[format, dtype] = folder = parent / f"{format}-{dtype}"
            write_checkpoint(folder, config, tensors, task=task, format=format, dtype=dtype, verify=False)
    return folders
