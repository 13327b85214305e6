"""The options of `opt-zoo generate`: every option of `GenerationConfig` that is one word, by its own name.

Names, types, defaults and what they may be come from `opt_core.generation_config`; nothing is checked here.
"""

import argparse
import dataclasses
from typing import Any

from opt_core.generation_config import GenerationConfig, expected

# Those that matter to a program only: what a call returns, and how.
_OF_PROGRAMS = ("use_cache", "output_scores", "output_logits", "return_dict_in_generate")
_SHORT = {"prompt_lookup_num_tokens": "--prompt-lookup"}


def _word(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


_TAKES: dict[Any, dict[str, Any]] = {
    bool: {"action": argparse.BooleanOptionalAction},
    bool | str: {"type": _word, "metavar": "WORD"},
    str: {"metavar": "WORD"},
    int: {"type": int, "metavar": "N"},
    int | None: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    float | None: {"type": float, "metavar": "X"},
}
OPTIONS = {f.name: f for f in dataclasses.fields(GenerationConfig) if f.type in _TAKES and f.name not in _OF_PROGRAMS}


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options; those that are not on a command line are not in its namespace."""
    group = parser.add_argument_group(
        "options of generation", "What is not given is as generation_config.json of SOURCE says, else as published."
    )
    for name, option in OPTIONS.items():
        flags = [f"--{name.replace('_', '-')}", *([_SHORT[name]] if name in _SHORT else [])]
        text = f"{expected(name)} (published: {option.default})"
        group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text, **_TAKES[option.type])
    group.add_argument(
        "--stop", dest="stop_strings", action="append", metavar="TEXT", default=argparse.SUPPRESS,
        help="a text that ends the generated one; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--seed", action="append", type=int, metavar="N", default=argparse.SUPPRESS,
        help="the same text in every backend and on every run; repeated: one for each prompt",
    )  # fmt: skip


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a command line gives, as keyword arguments of `generate`."""
    given = {name: getattr(args, name) for name in (*OPTIONS, "stop_strings", "seed") if hasattr(args, name)}
    if len(given.get("seed", ())) == 1:
        given["seed"] = given["seed"][0]
    return given
