"""Arguments that several commands have: lists of names, and files to write."""

import argparse
import os
from collections.abc import Callable, Collection


def some_of(choices: Collection[str]) -> Callable[[str], list[str]]:
    """The type of an argument that is a list of names with commas, some of `choices`."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",")))
        unknown = [name for name in names if name not in choices]
        if unknown:
            got = ", ".join(map(repr, unknown))
            raise argparse.ArgumentTypeError(f"expected some of {','.join(choices)}, got {got}")
        return names

    return parse


def words(choices: Collection[str]) -> str:
    """The help of such an argument."""
    return f"some of {','.join(choices)} (default: all)"


def file_problems(**paths: str | None) -> list[str]:
    """A line for each option whose value cannot become a file."""
    return [
        f"--{option}: expected a file in a folder that exists, got {path}"
        for option, path in paths.items()
        if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."))
    ]
