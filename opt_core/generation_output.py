"""What a search returns, and the record that it keeps of its scores on the way."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from opt_core.generation_config import GenerationConfig
from opt_core.logits_pipeline import apply_rules
from opt_core.logits_rules import LogitsRule
from opt_core.prefix import Prefix

Array = Any  # NumPy's here; a backend hands out its own


class GenerateOutput(NamedTuple):
    """Fields that were not asked for are None. R = prompts x `num_return_sequences`, each prompt's texts together.

    `scores` and `logits` have no meaning for a row that has ended. `sequences_scores` is the sum of the
    log-probabilities of a text over its length ** `length_penalty`; `beam_indices` tells which row of a step each token
    came from, -1 after the end.
    """

    sequences: Array  # [R, T + n] token ids: the prompt as it was given, then the new tokens
    scores: tuple[Array, ...] | None = None  # n times [R, V] (beams: all of them): after all rules
    logits: tuple[Array, ...] | None = None  # n times [R, V]: as the model gave them
    sequences_scores: Array | None = None  # [R], beam search only
    beam_indices: Array | None = None  # [R, n], beam search only


class Record:
    """Applies the rules of a call, and keeps scores and logits where they were asked for."""

    def __init__(self, rules: Sequence[LogitsRule], settings: GenerationConfig):
        self.rules = rules
        self.scores: list[np.ndarray] | None = [] if settings.output_scores else None
        self.logits: list[np.ndarray] | None = [] if settings.output_logits else None

    def processed(self, prefix: Prefix, logits_RV: np.ndarray, scores_RV: np.ndarray | None = None) -> np.ndarray:
        """The scores [R, V] after the rules: those of the logits, or of `scores_RV`, which may be written into."""
        if self.logits is not None:
            self.logits.append(logits_RV.copy())
        # An array that a framework handed out may be read-only.
        scores_RV = np.require(logits_RV if scores_RV is None else scores_RV, np.float32, ["W"])
        scores_RV = self.apply(prefix, scores_RV)
        if self.scores is not None:
            self.scores.append(scores_RV.copy())
        return scores_RV

    def apply(self, prefix: Prefix, scores_RV: np.ndarray) -> np.ndarray:
        """The scores after the rules, of which nothing is kept."""
        return apply_rules(self.rules, prefix, scores_RV)

    @property
    def scores_so_far(self) -> tuple[np.ndarray, ...] | None:
        return None if self.scores is None else tuple(self.scores)

    def output(self, sequences: np.ndarray, **fields) -> GenerateOutput:
        logits = None if self.logits is None else tuple(self.logits)
        return GenerateOutput(sequences, self.scores_so_far, logits, **fields)


def as_arrays(out: GenerateOutput, convert: Callable[[np.ndarray], Array]) -> GenerateOutput:
    """The output in a backend's own arrays; tuples of arrays and None stay what they are."""

    def converted(value):
        return value if value is None else tuple(map(convert, value)) if isinstance(value, tuple) else convert(value)

    return GenerateOutput(*map(converted, out))
