"""Valid tiny checkpoints, one for each format and way to divide it into files: what the cases damage."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from checkpoints import config_of, tensors_of

from conversion import write_checkpoint
from hostile import bases_by_hand
from hostile.bases_by_hand import METASEQ

CONFIG = config_of()
TENSORS = tensors_of(CONFIG)


def write(folder: Path, format: str, tensors=TENSORS, config=CONFIG, **options) -> None:
    write_checkpoint(folder, config, tensors, format=format, **options)


BASES: dict[str, Callable[..., None]] = {
    **{
        f"{format}{sharded}": partial(write, format=format, **options)
        for format in ("safetensors", "torch-bin", "flax-msgpack", "flax-safetensors", "tf-h5", "tf-safetensors")
        for sharded, options in (("", {}), (" in shards", dict(max_shard_size="25KB")))
    },
    **{format: partial(write, format=format) for format in ("orbax", "tf-checkpoint", "keras-hub")},
    "metaseq": partial(write, format="metaseq", config=METASEQ, tensors=tensors_of(METASEQ), parts=2),
    **bases_by_hand.BASES,
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


def with_value(tensors: dict[str, np.ndarray], value: float, name: str) -> dict[str, np.ndarray]:
    """The weights, with one element of one of them replaced."""
    array = tensors[name].copy()
    array.flat[array.size // 2] = value
    return {**tensors, name: array}
