"""Finds a checkpoint by local path or hub id, and uploads a folder; all traffic goes through `huggingface_hub`.

Only config.json and the weights in one format are fetched. `huggingface_hub` is imported when a hub is needed.
"""

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from conversion.formats import FORMATS
from conversion.index import index_files
from opt_core.config import CONFIG_NAME
from opt_core.errors import CheckpointError
from opt_core.generation_config import GENERATION_CONFIG_NAME

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/\w[\w.-]*)?", re.ASCII)


def resolve(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    subfolder: str | None = None,
    force_download: bool = False,
    endpoint: str | None = None,
) -> Path:
    """The local folder or file of a checkpoint: `source` itself if it exists, else a hub repository, fetched or cached.

    Of a repository it fetches config.json and the weights: safetensors if it has them, else `.bin`, else Flax, else
    TensorFlow. The arguments are those of `huggingface_hub.hf_hub_download`.

    Raises:
        CheckpointError: `source` is neither; the error says what was tried.
    """
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise CheckpointError("source", [f"expected a folder, a weight file or a hub id, got {source!r}"])
    local = Path(source).expanduser()
    if local.exists():
        return local / subfolder if subfolder else local
    if (index := local.with_name(f"{local.name}.index")).is_file():  # TensorFlow names a checkpoint by its prefix
        return index
    if isinstance(source, os.PathLike) or not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(str(source), ["no such file or folder, and not a hub id (organisation/name)"])
    options = dict(
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        subfolder=subfolder,
        force_download=force_download,
        endpoint=endpoint,
    )
    return _fetch(str(source), revision, options)


def _fetch(repo_id: str, revision: str | None, options: dict) -> Path:
    from huggingface_hub import hf_hub_download

    def fetch(name: str, revision: str | None) -> Path:
        return Path(hf_hub_download(repo_id, name, revision=revision, **options))

    try:
        config = fetch(CONFIG_NAME, revision)
        commit = _commit(config) or revision  # the weights come from the same commit, whatever is pushed meanwhile
        _fetch_weights(repo_id, lambda name: fetch(name, commit))
        _fetch_generation_config(lambda name: fetch(name, commit))
    except (OSError, ValueError) as error:  # what the hub client raises derives from these two
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())[:500]
        tried = ["no such local file or folder", f"hub: {type(error).__name__}: {reason}"]
        raise CheckpointError(repo_id, tried) from error
    return config.parent


def _commit(path: Path) -> str | None:
    """The commit in the path of a file in the hub's cache."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _fetch_weights(repo_id: str, fetch: Callable[[str], Path]) -> None:
    from huggingface_hub.utils import EntryNotFoundError

    tried = []
    for name, suffix in _names_on_the_hub().items():
        try:
            path = fetch(name)
        except EntryNotFoundError:
            tried.append(name)
            continue
        for shard in index_files(path, suffix) if name.endswith(".index.json") else ():
            fetch(shard)
        return
    raise CheckpointError(
        repo_id, ["no such local file or folder", f"hub: has {CONFIG_NAME}, but none of {', '.join(tried)}"]
    )


def _fetch_generation_config(fetch: Callable[[str], Path]) -> None:
    """Options of generation, which few repositories have."""
    from huggingface_hub.utils import EntryNotFoundError

    with contextlib.suppress(EntryNotFoundError):  # where the hub cannot be reached either, the cache has none
        fetch(GENERATION_CONFIG_NAME)


def _names_on_the_hub() -> dict[str, str]:
    """The weight files of repositories, published formats and KerasHub's, to the suffix of their shards."""
    published = {name: f.suffix for f in FORMATS.values() if f.has_shards for name in (f.single_name, f.index_name)}
    return published | {FORMATS["keras-hub"].single_name: FORMATS["keras-hub"].suffix}


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
) -> str:
    """Uploads a folder to a model repository, made if need be; returns the address of the commit or pull request."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=Path(folder),
        commit_message=commit_message or "Upload OPT weights",
        revision=revision,
        create_pr=create_pr,
    )
    return commit.pr_url or commit.commit_url
