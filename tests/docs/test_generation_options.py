"""The table of options in docs/generation.md: every option once, with its default; and the arguments of a call."""

import ast
import dataclasses
import re
from pathlib import Path

from opt_core.generation_config import GenerationConfig
from opt_core.generation_options import CALL_ARGUMENTS

TEXT = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")


def rows() -> list[tuple[str, object]]:
    """The names and defaults of the table."""
    table = TEXT.partition("| option | default |")[2].partition("\n\n")[0].splitlines()[2:]
    pairs = []
    for line in table:
        names, defaults = (CODE.findall(cell) for cell in line.split("|")[1:3])
        pairs += zip(names, map(ast.literal_eval, defaults), strict=True)
    return pairs


def test_the_table_has_every_option_once_with_its_default():
    options = {f.name: f.default for f in dataclasses.fields(GenerationConfig) if f.name != "extra"}
    assert len(rows()) == len(options)
    assert dict(rows()) == options


def test_every_argument_of_a_call_is_named():
    named = set(CODE.findall(TEXT.partition("And of a call alone:")[2].partition("\n\n")[0]))
    assert {name.replace("assistant_config", "assistant_model") for name in CALL_ARGUMENTS} <= named
