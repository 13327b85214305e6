"""Several processes that have one model, PyTorch: whose rows are whose, numbers that are of all, and one that is gone.

Which axes cut a batch: `opt_core.sharding`; how weights are cut and gathered is the business of `sharding.py`. A model
without a mesh is one process that has every batch whole.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from opt_core.errors import TrainingError
from opt_core.sharding import batch_axes, batch_rows


def part_of_batch(model) -> tuple[int, int]:
    """Which part of every batch this process has, and of how many."""
    if model.mesh is None:
        return 0, 1
    parts = math.prod(map(model.mesh.size, batch_axes(model.mesh, model.rules)))
    return batch_rows(parts, model.mesh, model.device_mesh.get_coordinate(), model.rules).start, parts


def sum_of_parts(model, number: float) -> float:
    """The sum over the parts of a batch, the same on every process."""
    if model.mesh is None:
        return number
    total = torch.tensor(number, dtype=torch.float64, device=model.device)
    for axis in batch_axes(model.mesh, model.rules):
        dist.all_reduce(total, group=model.device_mesh.get_group(axis))
    return float(total)


def whole_rows(model, x):
    """The rows of all parts, of a tensor or a tuple of them; None stays None."""
    axes = () if model.mesh is None else batch_axes(model.mesh, model.rules)
    if x is None or not axes:
        return x
    if not isinstance(x, Tensor):
        return tuple(whole_rows(model, each) for each in x)
    rows = DTensor.from_local(x.contiguous(), model.device_mesh[axes], [Shard(0)] * len(axes), run_check=False)
    return rows.full_tensor()


@contextlib.contextmanager
def other_processes(model, step: int | None) -> Iterator[None]:
    """Within, a call that waits for processes which are gone is a TrainingError.

    gloo notices at once. With nccl `torchrun` ends the others, or their watchdog does after the timeout of the group.
    """
    try:
        yield
    except RuntimeError as error:
        if model.mesh is None or not _is_of_communication(error):
            raise
        text = "another process is gone; started again, with any number of processes, a run resumes from its last"
        title = "processes" if step is None else f"step {step}"
        raise TrainingError(title, [f"{text} checkpoint ({str(error).strip().splitlines()[0]})"]) from error


def _is_of_communication(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)  # gloo's own are plain in torch 2.13
