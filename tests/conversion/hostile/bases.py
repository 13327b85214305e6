"""Valid tiny checkpoints, one for each format and way to divide it into files: what the cases damage."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from checkpoints import config_of, tensors_of

from conversion import write_checkpoint

CONFIG = config_of()
TENSORS = tensors_of(CONFIG)


def write(folder: Path, format: str, tensors=TENSORS, config=CONFIG, **options) -> None:
    write_checkpoint(folder, config, tensors, format=format, **options)


BASES: dict[str, Callable[[Path], None]] = {
    **{
        f"{format}{sharded}": partial(write, format=format, **options)
        for format in ("safetensors", "torch-bin", "flax-msgpack", "flax-safetensors", "tf-h5", "tf-safetensors")
        for sharded, options in (("", {}), (" in shards", dict(max_shard_size="25KB")))
    },
}


def make_base(base: str, folder: Path, templates: Path) -> Path:
    """A fresh copy of a base in `folder`; each is written once, below `templates`."""
    template = templates / base.replace(" ", "-")
    if not template.exists():
        BASES[base](template)
    return Path(shutil.copytree(template, folder))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights' bytes, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json")


def weight_file(folder: Path) -> Path:
    """The largest of them."""
    return max(weight_files(folder), key=lambda path: path.stat().st_size)


def with_value(value: float, name: str = "decoder.layers.1.fc1.weight") -> dict[str, np.ndarray]:
    """The weights, with one element of one of them replaced."""
    array = TENSORS[name].copy()
    array.flat[array.size // 2] = value
    return {**TENSORS, name: array}
