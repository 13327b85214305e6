"""What SOURCE means on the command line: an embedded checkpoint, a folder, a weight file, or a hub id."""

import argparse
from pathlib import Path

from opt_core.errors import InputError
from opt_zoo.embedded import DEFAULT, NAMES, embedded_folder


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds SOURCE and its twin `--model`, which a command line with other positional words can do without."""
    names = " or ".join(NAMES)
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE", help=f"folder, weight file, hub id, or {names} (default: {DEFAULT})"
    )
    parser.add_argument("--model", metavar="SOURCE", help="the same as SOURCE")


def find_source(source: str | None, model: str | None) -> str:
    """The folder of an embedded checkpoint, or the source as it was given.

    A folder of the same name in the current directory must be written with its path: `./opt-tiny`.

    Raises:
        InputError: SOURCE and `--model` together, or an embedded checkpoint that this installation lacks.
    """
    if source is not None and model is not None:
        raise InputError("opt-zoo", [f"--model: expected SOURCE or --model, got both: {source}, {model}"])
    source = source if source is not None else model if model is not None else DEFAULT
    if source not in NAMES:
        return source
    folder = embedded_folder(source)
    if not (folder / "config.json").is_file():
        raise InputError("opt-zoo", [f"{source}: expected the embedded checkpoint in {folder}, which holds none"])
    return str(folder)


def display_name(source: str) -> str:
    """The short name for reports: an embedded checkpoint's name, else the source itself."""
    path = Path(source)
    return path.name if path.name in NAMES and path == embedded_folder(path.name) else source
