"""The options of text generation: published names and defaults, strict validation, `generation_config.json`.

Names, defaults and meanings are those of `GenerationConfig` in Hugging Face transformers 4.57.6, as far as they concern
OPT. Which strategy the options make, and what is refused in a call, is decided in `opt_core.generation_request`.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opt_core.config import OPTConfig
from opt_core.errors import ConfigError, raise_if
from opt_core.json_file import read_json_object
from opt_core.keywords import OnlyItsFields
from opt_core.small_files import find_file, write_whole

GENERATION_CONFIG_NAME = "generation_config.json"

# Options for which None means "off", and the value that is off.
OFF: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "output_logits": False,
}


_ROLE_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class GenerationConfig(OnlyItsFields):
    """Options of `generate`; those that a call does not give are taken from here.

    `max_length` counts the prompt's columns; its default stands for 20 new tokens, as published. `sequence_bias` is a
    list of [ids, bias], or a dict from tuples of ids. Token ids of None are those of the model's config. `extra` keeps
    unknown fields of a file through a round trip; nothing reads them.

    Raises:
        ConfigError: lists every field with a value that it cannot have.
        TypeError: an unknown keyword.
        AttributeError: something is set that is no field.
    """

    max_length: int | None = 20
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    early_stopping: bool | str = False
    max_time: float | None = None
    stop_strings: str | list[str] | None = None
    do_sample: bool = False
    num_beams: int = 1
    use_cache: bool = True
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] | None = None
    renormalize_logits: bool = False
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: list | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    sequence_bias: list | dict | None = None
    num_return_sequences: int = 1
    output_scores: bool = False
    output_logits: bool = False
    return_dict_in_generate: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    num_assistant_tokens: int = 20
    num_assistant_tokens_schedule: str = "constant"
    assistant_confidence_threshold: float | None = 0.4
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    penalty_alpha: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, off in OFF.items():
            if getattr(self, name) is None:
                setattr(self, name, off)
        if isinstance(self.sequence_bias, dict):
            self.sequence_bias = list(self.sequence_bias.items())
        for f in dataclasses.fields(self):
            value = plain(getattr(self, f.name))
            if f.type in (float, float | None) and _is_int(value):
                value = float(value)  # the published classes insist on 2.0 where 2 is meant
            setattr(self, f.name, value)
        self.check()

    def check(self) -> None:
        """Raises one ConfigError that lists everything wrong with the fields."""
        raise_if(ConfigError, "GenerationConfig", self._problems())

    def _problems(self) -> list[str]:
        problems = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            expected, is_right = _RULES.get(f.name) or _SWITCH
            if not (value is None and f.default is None) and not is_right(value):
                problems.append(f"{f.name}: expected {expected}, got {value!r}")
        return problems

    # -- JSON ---------------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, source: str = GENERATION_CONFIG_NAME) -> "GenerationConfig":
        """Builds a config from published fields; unknown ones are kept in `extra`.

        Options that are not done here are kept, too, and refused when something is generated with them.

        Raises:
            ConfigError: lists every wrong field, naming `source`.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {name: value for name, value in fields.items() if name not in known}
        try:
            return cls(**{name: copy.deepcopy(fields[name]) for name in fields if name in known}, extra=extra)
        except ConfigError as error:
            raise ConfigError(source, error.problems) from None

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, and the kept unknown fields: the contents of `generation_config.json`."""
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name != "extra"}
        changed = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return copy.deepcopy({**self.extra, **changed})

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str | None = None,
    ) -> "GenerationConfig":
        """Reads `generation_config.json` of a folder or a hub id, or the file itself.

        Raises:
            ConfigError: lists what is wrong with the file, or says where it was looked for.
        """
        hub_options = dict(revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
        path = find_file(source, GENERATION_CONFIG_NAME, subfolder=subfolder, error=ConfigError, **hub_options)
        return cls.from_dict(read_json_object(path), source=str(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `generation_config.json` into a folder, keys sorted."""
        self.check()
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(Path(folder) / GENERATION_CONFIG_NAME, text)

    def save_beside(self, config: OPTConfig, folder: str | Path) -> None:
        """Writes `generation_config.json` for the model of `config`, with its token ids where these options name none.

        transformers looks for ids in this file alone where it is there (4.57.6), and would not end a text without.
        Where no option has another value than the published one there is no file, unless it replaces one.
        """
        if self != GenerationConfig() or (Path(folder) / GENERATION_CONFIG_NAME).exists():
            ids = {name: getattr(config, name) for name in _ROLE_IDS if getattr(self, name) is None}
            self.replace(**ids).save_pretrained(folder)

    # -- one call -----------------------------------------------------------------------------------------------------

    def replace(self, **changes) -> "GenerationConfig":
        """A copy with `changes`; None leaves a field as it is, or turns off what has a value that is off."""
        fields = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return GenerationConfig(**{**fields, **{n: v for n, v in changes.items() if v is not None or n in OFF}})

    @property
    def stop_texts(self) -> tuple[str, ...]:
        texts = self.stop_strings or ()
        return (texts,) if isinstance(texts, str) else tuple(texts)


def expected(name: str) -> str:
    """What the values of an option may be, in words."""
    return (_RULES.get(name) or _SWITCH)[0]


def plain(value: Any) -> Any:
    """Numbers of Python for those of NumPy, lists for arrays and tuples: what JSON can hold."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return list(map(plain, value)) if isinstance(value, (list, tuple)) else value


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(expected: str, is_right: Callable[[float], bool]) -> tuple[str, Callable[[Any], bool]]:
    return expected, lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and is_right(v)


def _whole(expected: str, is_right: Callable[[int], bool]) -> tuple[str, Callable[[Any], bool]]:
    return expected, lambda v: _is_int(v) and is_right(v)


def _as_list(value) -> list:
    return value if isinstance(value, list) and value else [None]


def _is_id(value) -> bool:
    return _is_int(value) and value >= 0


def _is_ids(value) -> bool:
    return isinstance(value, list) and all(map(_is_id, value))


def _is_biases(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and _is_ids(pair[0]) and len(pair[0]) > 0
        and isinstance(pair[1], (int, float)) and not isinstance(pair[1], bool) and abs(pair[1]) < _INFINITY
        for pair in value
    )  # fmt: skip


_INFINITY = float("inf")
_SWITCH = ("True or False", lambda v: isinstance(v, bool))
_POSITIVE = _whole("a positive integer", lambda v: v > 0)
_COUNT = _whole("an integer of at least 0", lambda v: v >= 0)
_PROBABILITY = _number("a number from 0 to 1", lambda v: 0 <= v <= 1)
_ABOVE_ZERO = _number("a number above 0", lambda v: 0 < v < _INFINITY)
_IDS = ("a list of token ids", _is_ids)
_ID_OR_IDS = ("a token id or a list of them", lambda v: _is_id(v) or _is_ids(v))
_ID = ("a token id", _is_id)

# Field -> what it may be, in words and as a test; fields that are not listed are switches.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "max_length": ("a positive integer or None", lambda v: v is None or (_is_int(v) and v > 0)),
    "max_new_tokens": _POSITIVE,
    "min_length": _COUNT,
    "min_new_tokens": _COUNT,
    "early_stopping": ("True, False or 'never'", lambda v: isinstance(v, bool) or v == "never"),
    "max_time": _ABOVE_ZERO,
    "stop_strings": (
        "a string or a list of strings, none empty",
        lambda v: v != "" and all(isinstance(s, str) and s for s in ([v] if isinstance(v, str) else _as_list(v))),
    ),
    "num_beams": _POSITIVE,
    "temperature": _ABOVE_ZERO,
    "top_k": _COUNT,
    "top_p": _PROBABILITY,
    "min_p": _PROBABILITY,
    "typical_p": _number("a number above 0, at most 1", lambda v: 0 < v <= 1),
    "epsilon_cutoff": _number("a number from 0, below 1", lambda v: 0 <= v < 1),
    "eta_cutoff": _number("a number from 0, below 1", lambda v: 0 <= v < 1),
    "repetition_penalty": _ABOVE_ZERO,
    "length_penalty": _number("a finite number", lambda v: abs(v) < _INFINITY),
    "no_repeat_ngram_size": _COUNT,
    "bad_words_ids": (
        "a list of lists of token ids, none empty",
        lambda v: isinstance(v, list) and all(_is_ids(word) and len(word) > 0 for word in v),
    ),
    "forced_bos_token_id": _ID,
    "forced_eos_token_id": _ID_OR_IDS,
    "exponential_decay_length_penalty": (
        "[a number of tokens, a factor above 0]",
        lambda v: isinstance(v, list) and len(v) == 2 and _is_id(v[0]) and _ABOVE_ZERO[1](v[1]),
    ),
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "sequence_bias": ("a list of [token ids, finite bias]", _is_biases),
    "num_return_sequences": _POSITIVE,
    "pad_token_id": _ID,
    "bos_token_id": _ID,
    "eos_token_id": _ID_OR_IDS,
    "num_assistant_tokens": _POSITIVE,
    "num_assistant_tokens_schedule": (
        "'constant', 'heuristic' or 'heuristic_transient'",
        lambda v: v in ("constant", "heuristic", "heuristic_transient"),
    ),
    "assistant_confidence_threshold": ("a number from 0 to 1 or None", lambda v: v is None or _PROBABILITY[1](v)),
    "prompt_lookup_num_tokens": _POSITIVE,
    "max_matching_ngram_size": _POSITIVE,
    "penalty_alpha": _PROBABILITY,
    "extra": ("a dict", lambda v: isinstance(v, dict)),
}
