"""Two processes save a checkpoint of parts; one is killed in the middle of it, or fails: models, target, how."""

import os
import signal
import sys
from pathlib import Path

from torch.distributed.checkpoint import filesystem
from train_sharded import RECIPE, model_of

from opt_torch import distributed_checkpoint
from opt_torch.sharding import init_mesh
from opt_torch.training import Trainer


def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def full(*_, **__):
    raise OSError("disk full")


def spoil(how: str, rank: str) -> None:
    if (how, rank) == ("killed while it writes", "1"):
        filesystem._write_item = killed
    elif (how, rank) == ("killed before the name is given", "0"):
        distributed_checkpoint.os.rename = killed
    elif (how, rank) == ("a full disk", "1"):
        filesystem._write_item = full


if __name__ == "__main__":
    folder, target, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    trainer = Trainer(model_of(folder, mesh=init_mesh("fsdp=2", "cpu"), double=False), RECIPE)
    spoil(how, os.environ["RANK"])
    try:
        distributed_checkpoint.save_distributed(trainer, target)
    except ValueError as error:
        print(f"{type(error).__name__}: {error}")
