"""Compiled programs kept on disk, so that the next process need not compile them: XLA's own persistent cache, set up.

TensorFlow reads where it is from TF_XLA_FLAGS, once, before the first program is compiled. It knows a program by its
operations, its shapes and the version of XLA. It is never emptied: delete the folder. Python's tracing is not kept.
"""

import os
import time
from pathlib import Path

import tensorflow as tf


def use_compilation_cache(folder: str | os.PathLike | None = None) -> Path:
    """Keeps every program that XLA compiles from now on in this process, the user's own too; returns the folder.

    Entries are machine code: share no folder with those whom you would not let run code as yourself.

    Args:
        folder: made where it is missing; by default `opt-zoo/compilation/tf` in $XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        RuntimeError: where this process has compiled already, so that TensorFlow (2.21) does not look any more.
    """
    folder = (default_folder() if folder is None else Path(folder).expanduser()).absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.environ.get("TF_XLA_FLAGS", "")
    os.environ["TF_XLA_FLAGS"] = f'{flags} --tf_xla_persistent_cache_directory="{folder}"'.lstrip()
    if not _keeps_programs(folder):
        os.environ["TF_XLA_FLAGS"] = flags
        raise RuntimeError("use_compilation_cache: expected before the first compiled program, got after it")
    return folder


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opt-zoo" / "compilation" / "tf"


def _keeps_programs(folder: Path) -> bool:
    """Whether a program never compiled before comes to lie in the folder."""
    before, number = set(folder.iterdir()), time.time_ns()
    tf.function(lambda x: x + number, jit_compile=True, autograph=False)(tf.constant(0, tf.int64))
    new = set(folder.iterdir()) - before
    for entry in new:
        entry.unlink(missing_ok=True)
    return bool(new)
