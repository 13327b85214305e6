"""The prompt of a generation and its length: what is continued, how far, and what is refused before it starts.

What the options of a call mean is decided in `opt_core.generation_request`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from opt_core.checks import Known, check_inputs
from opt_core.config import OPTConfig
from opt_core.errors import InputError, raise_if

DEFAULT_NEW_TOKENS = 20  # as in the published PyTorch class
BUCKET = 64  # compiled functions see lengths rounded up to a multiple of this, so that few shapes are compiled


class GenerationPlan(NamedTuple):
    """A checked request."""

    input_ids: np.ndarray  # [B, T] int64
    real: np.ndarray  # [B, T] bool, True: a real token
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int  # what rows hold after their end

    @property
    def has_padding(self) -> bool:
        return not self.real.all()

    @property
    def capacity(self) -> int:
        """Cache slots a row, in whole buckets."""
        return bucketed(self.input_ids.shape[1] + self.max_new_tokens)


def plan_prompt(
    config: OPTConfig,
    input_ids: Known | None,
    attention_mask: Known | None,
    *,
    max_new_tokens: int | None,
    max_length: int | None,
    eos_token_id: int | list[int] | None,
    pad_token_id: int | None,
    problems: list[str],
) -> GenerationPlan:
    """Checks a prompt and its length, and fills in what the caller left out.

    Without `attention_mask`, tokens equal to `pad_token_id` are padding (unless it ends the text, too). Without a
    length, 20 new tokens, or as many as there are positions for. `max_length` counts the prompt's columns.

    Raises:
        InputError: all at once (lengths once prompt and ids are right), with the `problems` that were found before.
    """
    eos = config.eos_token_ids if eos_token_id is None else tuple(np.atleast_1d(eos_token_id).tolist())
    pad = _first_of(pad_token_id, config.pad_token_id, *eos, 0)
    wrong_ids = id_problems(config, eos_token_id=eos, pad_token_id=(pad,))
    problems = [*problems, *wrong_ids]
    try:
        check_inputs(config, input_ids=input_ids, attention_mask=attention_mask)
    except InputError as error:  # what follows reads the prompt
        raise InputError("generate", [*error.problems, *problems]) from None
    raise_if(InputError, "generate", problems if wrong_ids else [])  # what follows compares with them
    assert input_ids is not None  # or the check above would have refused it
    ids = np.asarray(input_ids.values).astype(np.int64)
    real = _real_tokens(ids, attention_mask, pad, eos)
    problems += [f"attention_mask: row {row} has no real token" for row in np.flatnonzero(~real.any(1))]
    length, more_problems = _new_tokens(config, real, max_new_tokens, max_length)
    problems += more_problems
    raise_if(InputError, "generate", problems)
    return GenerationPlan(ids, real, length, eos, pad)


def id_problems(config: OPTConfig, **ids: Iterable) -> list[str]:
    """A line for each token id, by the name of its option, that the vocabulary does not have."""
    return [
        f"{name}: expected an id from 0 to {config.vocab_size - 1}, got {i!r}"
        for name, token_ids in ids.items()
        for i in token_ids
        if not isinstance(i, (int, np.integer)) or not 0 <= i < config.vocab_size
    ]


def _real_tokens(ids: np.ndarray, attention_mask: Known | None, pad: int, eos: tuple[int, ...]) -> np.ndarray:
    if attention_mask is not None:
        return attention_mask.values != 0
    return np.not_equal(ids, pad) if pad not in eos else np.ones(ids.shape, bool)


def _new_tokens(config: OPTConfig, real: np.ndarray, max_new_tokens, max_length) -> tuple[int, list[str]]:
    """The number of new tokens, and what is wrong with it. The last one needs no position: it is never fed back."""
    room = config.max_position_embeddings + 1 - int(real.sum(1).max(initial=0))
    if max_new_tokens is None and max_length is None:
        return min(DEFAULT_NEW_TOKENS, room), []
    name, asked = ("max_new_tokens", max_new_tokens) if max_new_tokens is not None else ("max_length", max_length)
    if isinstance(asked, bool) or not isinstance(asked, (int, np.integer)) or asked < 1:
        return 0, [f"{name}: expected a positive integer, got {asked!r}"]
    length = int(asked) - (real.shape[1] if max_new_tokens is None else 0)
    if length < 1:
        return 0, [f"max_length: expected more than the {real.shape[1]} tokens of the prompt, got {asked}"]
    if length > room:
        return 0, [
            f"{name}: the prompt leaves room for {room} new tokens (max_position_embeddings = "
            f"{config.max_position_embeddings}), got {asked}"
        ]
    return length, []


def bucketed(length: int) -> int:
    """`length` rounded up to whole buckets."""
    return -(-length // BUCKET) * BUCKET


def _first_of(*values):
    return next(value for value in values if value is not None)
