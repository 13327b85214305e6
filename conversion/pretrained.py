"""What `from_pretrained` does before a framework is involved: find the files, settle the config, compare them."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conversion.checkpoint import Checkpoint, open_checkpoint
from conversion.hub import resolve
from opt_core.checks import check_config
from opt_core.config import DTYPES, OPTConfig
from opt_core.errors import ConfigError, InputError, raise_if
from opt_core.generation_config import GENERATION_CONFIG_NAME, GenerationConfig
from opt_core.keywords import LOADING, published_problems
from opt_core.schema import SCHEMA, head_names, shapes

logger = logging.getLogger(__name__)


class Pretrained(NamedTuple):
    """An opened checkpoint that has been found to fit the class that asked for it."""

    checkpoint: Checkpoint
    config: OPTConfig
    dtype: str  # name of the dtype to load parameters in
    new: tuple[str, ...]  # head weights that the checkpoint lacks: fine-tuning starts them anew
    unused: tuple[str, ...]  # head weights of another class
    generation_config: GenerationConfig | None  # of generation_config.json beside the weights


def open_pretrained(
    source,
    task: str,
    *,
    config: OPTConfig | None = None,
    overrides: Mapping[str, Any],
    dtype: str | type | np.dtype | None = None,
    **hub_options,
) -> Pretrained:
    """Opens `source` for the class of `task`.

    Args:
        source: a folder, a weight file, or a hub id.
        overrides: config fields that the caller gave by keyword, or arguments that `opt_core.keywords` knows.
        dtype: None for float32, "auto" for the stored one, or one of `opt_core.config.DTYPES`, as a name or a type.
        hub_options: see `conversion.hub.resolve`.

    Raises:
        ConfigError: unknown or wrong config fields.
        CheckpointError: lists every missing, unexpected or mis-shaped tensor.
    """
    known = {f.name for f in dataclasses.fields(OPTConfig)} | {"bias"}
    wrong = [name for name in overrides if name not in known and name not in LOADING]
    problems = [f"{name}: neither an argument nor a field of OPTConfig" for name in wrong]
    raise_if(ConfigError, "from_pretrained", [*problems, *published_problems(overrides, LOADING)])
    overrides = {name: value for name, value in overrides.items() if name not in LOADING}
    if config is not None:
        check_config(config)
    checkpoint = open_checkpoint(resolve(source, **hub_options), config=config, overrides=overrides)
    config = checkpoint.config
    heads = {row.name for row in SCHEMA if len(row.tasks) == 1}
    unused = tuple(name for name in checkpoint.shapes if name in heads and name not in shapes(config, task))
    new = tuple(name for name in head_names(task) if name not in checkpoint.shapes)
    if len(new) < len(head_names(task)):
        new = ()  # half a head is a damaged checkpoint, not one without a head
    checkpoint.check(config, task, may_lack=new, may_have=unused)
    if new:
        logger.warning("%s: not in the checkpoint, started anew, to be trained: %s", source, ", ".join(new))
    if unused:
        logger.warning("%s: weights of another head, not used by this class: %s", source, ", ".join(unused))
    dtype, options = dtype_name(dtype, checkpoint), _generation_config(Path(checkpoint.source))
    return Pretrained(checkpoint, config, dtype, new, unused, options)


def _generation_config(source: Path) -> GenerationConfig | None:
    folder = source if source.is_dir() else source.parent
    return GenerationConfig.from_pretrained(folder) if (folder / GENERATION_CONFIG_NAME).is_file() else None


def dtype_name(dtype: str | type | np.dtype | None, checkpoint: Checkpoint) -> str:
    """The name of the parameters' dtype: float32 by default, with "auto" the widest one stored."""
    if dtype is None:
        return "float32"
    if isinstance(dtype, (type, np.dtype)):
        dtype = np.dtype(dtype).name
    if dtype == "auto":
        stored = set(checkpoint.dtypes.values())
        return stored.pop() if len(stored) == 1 and stored <= set(DTYPES) else "float32"
    if dtype not in DTYPES:
        raise InputError("from_pretrained", [f"dtype: expected one of auto, {', '.join(DTYPES)}, got {dtype!r}"])
    return dtype
