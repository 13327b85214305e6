"""Checkpoints on disk and on the hub, to and from the schema's tensors: one at a time, without any framework."""

from conversion.checkpoint import Checkpoint, open_checkpoint
from conversion.hub import push_folder, resolve
from conversion.write import write_checkpoint

__all__ = ["Checkpoint", "open_checkpoint", "push_folder", "resolve", "write_checkpoint"]
