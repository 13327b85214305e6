"""The settings of a tokenizer: their names, OPT's defaults, and what values they take."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken

from opt_core.batch_encoding import SIDES
from opt_core.errors import ProblemsError

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
OPT_ROLES = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}

# Names of the published class with OPT's values. `add_bos_token=None`: as `tokenizer.json` says.
SETTINGS: dict[str, Any] = {
    **OPT_ROLES,
    "additional_special_tokens": (),
    "add_bos_token": True,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "errors": "replace",
    "padding_side": "right",
    "truncation_side": "right",
    "model_max_length": None,
    "split_special_tokens": False,
}

FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


class TokenizerError(ProblemsError):
    """Tokenizer files or settings that are missing, damaged or contradict each other."""


def is_token(value) -> bool:
    content = value.get("content") if isinstance(value, Mapping) else getattr(value, "content", value)
    return isinstance(content, str) and content != ""


def as_added_token(value: str | Mapping[str, Any] | AddedToken) -> AddedToken:
    """A token with its flags, from its text, from the JSON form of the published files, or as it is."""
    if isinstance(value, Mapping):
        return AddedToken(value["content"], **{flag: bool(value[flag]) for flag in FLAGS if flag in value})
    return AddedToken(value, normalized=False) if isinstance(value, str) else value


def check_setting_names(call: str, settings: Mapping[str, Any]) -> None:
    unknown = sorted(settings.keys() - SETTINGS.keys())
    if unknown:
        raise TypeError(f"{call} got unexpected keywords {', '.join(unknown)}; known settings: {', '.join(SETTINGS)}")


def setting_problems(settings: Mapping[str, Any]) -> list[str]:
    """One line for each setting with a value that it cannot take."""
    problems = []
    for name, expected, holds in (
        *((role, "a token or None", lambda v: v is None or is_token(v)) for role in ROLES),
        ("additional_special_tokens", "a list of tokens", lambda v: v is None or _all_tokens(v)),
        ("add_bos_token", "true or false", lambda v: v is None or isinstance(v, bool)),
        ("add_prefix_space", "true or false", lambda v: isinstance(v, bool)),
        ("clean_up_tokenization_spaces", "true or false", lambda v: isinstance(v, bool)),
        ("errors", "'replace'", lambda v: v == "replace"),
        ("split_special_tokens", "false", lambda v: v is False),
        ("padding_side", "'left' or 'right'", lambda v: v in SIDES),
        ("truncation_side", "'left' or 'right'", lambda v: v in SIDES),
        ("model_max_length", "a positive number or None", lambda v: v is None or _is_positive(v)),
    ):
        if not holds(settings[name]):
            problems.append(f"{name}: expected {expected}, got {settings[name]!r}")
    return problems


def _all_tokens(value) -> bool:
    return isinstance(value, (list, tuple)) and all(is_token(token) for token in value)


def _is_positive(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
