"""What a backend gives to the searches: a model with a cache behind four calls, in NumPy. No search lives here.

Everything but plain greedy search is one loop on the host (`opt_core.searching`), so that the same call gives the same
tokens in every framework. A stepper keeps the cache; a row of it holds the real tokens of one text without gaps.
"""

from typing import NamedTuple, Protocol

import numpy as np


class StepOutput(NamedTuple):
    """`hidden`: the last hidden states (after the final norm and `project_out`), None unless they were asked for.

    After `prefill` logits are [R, V] and hidden states [R, T, E], in the columns of the prompt; after `step` of T
    tokens logits are [R, T, V] and hidden states [R, T, E].
    """

    logits: np.ndarray  # float32; written into unless it is read-only, so let nothing else look at it
    hidden: np.ndarray | None = None


class Stepper(Protocol):
    """One text per row. R, the number of rows, is that of the prompt until `reorder` changes it."""

    def prefill(
        self, input_ids_RT: np.ndarray, real_RT: np.ndarray, capacity: int, *, output_hidden: bool = False
    ) -> StepOutput:
        """Empties the cache and feeds the prompt; logits after the last real token of each row, wherever it stands.

        `real_RT` is True at real tokens; each row has one. No row will ever hold more than `capacity` tokens.
        """

    def step(self, tokens_RT: np.ndarray, *, output_hidden: bool = False) -> StepOutput:
        """Feeds T >= 1 further tokens to every row, all of them real; logits after each.

        T is 1 when a text grows, and up to `num_assistant_tokens` + 1 when drafts are verified. Positions stay below
        `max_position_embeddings` and `capacity`.
        """

    def reorder(self, rows_Q: np.ndarray) -> None:
        """Row q of the cache becomes what row `rows_Q[q]` was: rows may repeat, and their number may change."""

    def truncate(self, lengths_R: np.ndarray) -> None:
        """Keeps the oldest `lengths_R` tokens of each row, at least one, never more than there are."""


def width_of_step(tokens: int, room: int) -> int:
    """The columns that a compiled step of so many tokens has, a power of two: few widths, few programs.

    What is beyond the tokens is forgotten after the step; near the end of the cache, with `room` for fewer, nothing is.
    """
    width = 1 << (tokens - 1).bit_length()
    return width if width <= room else tokens
