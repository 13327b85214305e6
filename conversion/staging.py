"""Files that appear under their names all together or not at all: written to a hidden folder, synced, then renamed.

A target that does not exist yet appears by one rename of the folder. In one that does, the old checkpoint's files give
way to the new ones one by one, with config.json gone first and back last. While they do, the hidden folder bears a name
that says so; a process that is killed leaves it there, and `check_is_published` refuses what may be of two checkpoints.
Neither models nor formats are its business.
"""

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from opt_core.errors import CheckpointError

_SECONDS_BETWEEN_SYNCS = 0.1  # in which a fast disk writes 100 MB
_PREFIX, _SUFFIX, _REPLACING = ".opt-zoo-", ".tmp", ".replacing"


class Staging:
    """A hidden folder whose entries will become those of `target`."""

    def __init__(self, target: Path):
        self._target = target
        self._is_new = not target.exists()
        self._is_synced = False
        beside = target.absolute().parent if self._is_new else target
        beside.mkdir(parents=True, exist_ok=True)
        self.folder = beside / f"{_PREFIX}{uuid.uuid4().hex[:8]}{_SUFFIX}"
        self.folder.mkdir()

    def sync(self) -> None:
        """Waits until what was written so far is on the disk; nothing may be written afterwards."""
        for root, _, names in os.walk(self.folder):
            for name in names:
                sync_path(Path(root) / name)
            sync_path(Path(root))
        self._is_synced = True

    @contextlib.contextmanager
    def synced(self) -> Iterator[None]:
        """Brings to the disk what is written within, while it is written, and all of it at the end."""
        is_over = threading.Event()
        errors: list[OSError] = []
        thread = threading.Thread(target=self._keep_syncing, args=(is_over, errors))
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
        if errors:
            raise errors[0]
        self.sync()

    def _keep_syncing(self, is_over: threading.Event, errors: list[OSError]) -> None:
        """Stops at an error, and keeps it: Linux tells of a lost page once, not again to a later fsync."""
        while not is_over.wait(_SECONDS_BETWEEN_SYNCS) and not errors:
            try:
                for path in self.folder.rglob("*"):
                    sync_path(path)
            except FileNotFoundError:  # a temporary file of a container
                continue
            except OSError as error:
                errors.append(error)

    def publish(self, *, replaced: Callable[[Path], bool], last: str) -> list[Path]:
        """Gives every entry its name in the target; returns them, JSON files behind the others, `last` at the end.

        Args:
            replaced: tells the entries of an older checkpoint, which are deleted.
            last: the entry without which a checkpoint does not open.

        Raises:
            FileExistsError: another folder has the name of a new file, or the reverse; nothing is touched.
        """
        if not self._is_synced:
            self.sync()
        entries = [path.name for path in self.folder.iterdir()]
        names = sorted(entries, key=lambda name: (name == last, name.endswith(".json"), name))
        if self._is_new:
            os.rename(self.folder, self._target)
            sync_path(self._target.absolute().parent)
        else:
            self._replace(names, replaced, last)
        return [self._target / name for name in names]

    def _replace(self, names: list[str], replaced: Callable[[Path], bool], last: str) -> None:
        self._refuse_what_is_in_the_way(names, replaced)
        self._say_that_files_are_replaced()
        (self._target / last).unlink(missing_ok=True)
        sync_path(self._target)
        for path in list(self._target.iterdir()):
            if replaced(path):
                _delete(path)
        for name in names:
            if name == last:
                sync_path(self._target)
            os.replace(self.folder / name, self._target / name)
        sync_path(self._target)
        for path in _unfinished(self._target):  # this one, and those of runs that were killed
            shutil.rmtree(path)
        sync_path(self._target)

    def _refuse_what_is_in_the_way(self, names: list[str], replaced: Callable[[Path], bool]) -> None:
        for old in (self._target / name for name in names):
            if old.exists() and old.is_dir() != (self.folder / old.name).is_dir() and not replaced(old):
                raise FileExistsError(f"{old}: in the way, and nothing of a checkpoint")

    def _say_that_files_are_replaced(self) -> None:
        renamed = self.folder.with_suffix(_REPLACING)
        os.rename(self.folder, renamed)
        self.folder = renamed
        sync_path(self._target)

    def discard(self) -> None:
        """Deletes what has no name of its own yet; not what an error kept from replacing an older checkpoint."""
        if self.folder.suffix == _SUFFIX:
            shutil.rmtree(self.folder, ignore_errors=True)


def check_is_published(folder: Path) -> None:
    """Raises CheckpointError where a process died or failed amidst replacing one checkpoint by another."""
    for path in _unfinished(folder):
        text = "the program that replaced a checkpoint here was stopped; write it again with overwrite"
        raise CheckpointError(str(folder), [f"{path.name}: {text}"])


def _unfinished(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*{_REPLACING}"))


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Staging]:
    """A `Staging` that leaves nothing behind, published or not."""
    missing = [folder for folder in (target, *target.absolute().parents) if not folder.exists()]
    staged = Staging(target)
    try:
        yield staged
    finally:
        staged.discard()
        for folder in missing:
            with contextlib.suppress(OSError):  # holds files after a success
                folder.rmdir()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync_path(path: Path) -> None:
    """Brings a file, or the list of names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
