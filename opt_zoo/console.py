"""What commands share on the terminal: results on stdout, progress on stderr, so that a pipe gets results alone."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


def stdout_console() -> Console:
    """For tables; as wide as a report needs where stdout is no terminal."""
    console = Console(highlight=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=160)


def stderr_console() -> Console:
    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout and nothing else."""
    print(json.dumps(value, indent=2, allow_nan=False))


def _progress(*columns: ProgressColumn) -> Progress:
    console = stderr_console()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def counted_progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar of `total` steps on stderr. The function it gives is called with a description before each step."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with _progress(*columns) as progress:
        task = progress.add_task(title, total=total)
        begun = False

        def step(description: str) -> None:
            nonlocal begun
            progress.update(task, description=description, advance=int(begun))
            begun = True

        yield step


@contextlib.contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with speed and time left on stderr. The function it gives is called with (bytes done, bytes in all)."""
    from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), left)
    with _progress(*columns) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
