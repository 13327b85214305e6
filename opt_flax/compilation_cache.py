"""Compiled programs kept on disk, so that the next process need not compile them: JAX's own persistent cache, set up.

https://docs.jax.dev/en/latest/persistent_compilation_cache.html. It knows a program by its operations and by the
versions, options and hardware it was compiled for, so no entry goes stale. It is never emptied: delete the folder.
"""

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def use_compilation_cache(folder: str | os.PathLike | None = None) -> Path:
    """Keeps every program that JAX compiles from now on in this process, the user's own too; returns the folder.

    Entries are machine code: share no folder with those whom you would not let run code as yourself.

    Args:
        folder: made where it is missing; by default `opt-zoo/compilation/jax` in $XDG_CACHE_HOME, or in ~/.cache.
    """
    folder = default_folder() if folder is None else Path(folder).expanduser()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # one second leaves out most of the small ones
    compilation_cache.reset_cache()  # else JAX (0.10) stays with a folder that it has used already
    return folder


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opt-zoo" / "compilation" / "jax"
