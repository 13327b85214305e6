"""The small files of a checkpoint, configs and a tokenizer's: found in a folder or on the hub, written whole.

Weights are the business of `conversion`, which has a hub of its own: it chooses among formats and follows shards.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from opt_core.errors import ProblemsError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_folder(
    source: str | os.PathLike,
    names: Iterable[str],
    *,
    subfolder: str | None = None,
    error: type[ProblemsError],
    **hub_options,
) -> Path:
    """The local folder of `source`: itself, or the cached copy of a hub repository, of which only `names` are fetched.

    Args:
        error: what is raised where there is no such folder and no such repository.
        hub_options: those of `huggingface_hub.snapshot_download`.

    Raises:
        ImportError: huggingface_hub, needed for a repository, is missing.
    """
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise error("source", [f"expected a folder or a hub id, got {source!r}"])
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _fetch(source, [f"{subfolder}/{name}" if subfolder else name for name in names], error, hub_options)
    return folder / subfolder if subfolder else folder


def find_file(source: str | os.PathLike, name: str, *, error: type[ProblemsError], **options) -> Path:
    """The file of that name where `find_folder` finds one, or `source` itself if it is a file.

    Raises:
        error: there is none.
    """
    if isinstance(source, str | os.PathLike) and Path(source).is_file():
        return Path(source)
    path = find_folder(source, [name], error=error, **options) / name
    if not path.is_file():
        raise error(str(source), [f"expected {name} there, got none"])
    return path


def _fetch(source: str | os.PathLike, names: list[str], error: type[ProblemsError], hub_options: dict) -> Path:
    if Path(source).exists() or not _HUB_ID.fullmatch(str(source)):
        got = "a file" if Path(source).exists() else "neither"
        raise error(str(source), [f"source: expected a folder or a hub id as 'facebook/opt-125m', got {got}"])
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise ImportError(f"{source}: a hub id needs huggingface_hub; pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(str(source), allow_patterns=names, **hub_options))
    except (OSError, ValueError) as failure:
        problem = f"source: no folder of that name here, and the hub gave {type(failure).__name__}: {failure}"
        raise error(str(source), [problem]) from failure


def write_whole(path: str | os.PathLike, text: str) -> None:
    """A file that is there with all of its text or as it was; a pipe or a device is written to."""
    path = Path(path).resolve()  # through a link: what it points to is replaced, not the link
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
