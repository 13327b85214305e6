"""Rules that change the scores of the next token for any search: penalties, bans, forced tokens, biases.

A rule is called with the texts so far and their scores [R, V] (float32: logits, or log-probabilities in beam search),
may write into the scores, and returns them. Those that only shape the distribution of sampling are in
`opt_core.logits_cuts`, their order is in `opt_core.logits_pipeline`.

Semantics: the processors of Hugging Face transformers 4.57.6 (generation/logits_process.py), but for three points.
Padding is no part of a text: there it is penalised as repeated, and forms n-grams. A biased or bad sequence of n tokens
applies as soon as n - 1 tokens stand before it; there not in a text that has just these. Token 0 can be biased.
Lengths (`min_length`, `forced_bos_token_id`, ...) count the prompt's columns, padding included, as published.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from opt_core.errors import InputError
from opt_core.prefix import Prefix
from opt_core.sampling import log_softmax

Scores = np.ndarray  # [R, V] float32


class LogitsRule(Protocol):
    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores: ...


@dataclass(frozen=True)
class SequenceBias:
    """Adds a bias to the last token of each sequence wherever the text ends with the tokens before it."""

    biases: Sequence[tuple[tuple[int, ...], float]]

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        rows, which = np.nonzero(self._apply(prefix))
        places, place_of = np.unique(rows * scores_RV.shape[1] + self._lasts_N[which], return_inverse=True)
        biases = np.zeros(len(places), np.float32)  # summed before they are added, as published
        np.add.at(biases, place_of, self._biases_N[which])
        scores_RV[np.divmod(places, scores_RV.shape[1])] += biases
        return scores_RV

    def _apply(self, prefix: Prefix) -> np.ndarray:
        """True [R, N] where the text ends with what stands before the last token of a sequence."""
        rows, columns = prefix.ids_RS.shape
        apply_RN = np.zeros((rows, len(self.biases)), bool)
        for length, (which, before_nL) in self._befores.items():
            is_long_R = prefix.lengths_R >= length
            if is_long_R.any():
                ends_R1L = prefix.ids_RS[:, None, columns - length :]
                apply_RN[:, which] = (ends_R1L == before_nL).all(2) & is_long_R[:, None]
        return apply_RN

    @cached_property
    def _befores(self) -> dict[int, tuple[list[int], np.ndarray]]:
        """Length of what stands before the last token -> which sequences those are, and what stands there [n, L]."""
        which: dict[int, list[int]] = {}
        for index, (ids, _) in enumerate(self.biases):
            which.setdefault(len(ids) - 1, []).append(index)
        return {length: (n, np.array([self.biases[i][0][:-1] for i in n])) for length, n in which.items()}

    @cached_property
    def _lasts_N(self) -> np.ndarray:
        return np.array([ids[-1] for ids, _ in self.biases], np.int64)

    @cached_property
    def _biases_N(self) -> np.ndarray:
        return np.array([bias for _, bias in self.biases], np.float32)


def bad_words(bad_words_ids: Sequence[Sequence[int]], eos_token_ids: Sequence[int]) -> SequenceBias:
    """Bans sequences, but never an id that ends texts."""
    ends = {(token,) for token in eos_token_ids}
    banned = dict.fromkeys(tuple(word) for word in bad_words_ids)
    return SequenceBias([(word, -np.inf) for word in banned if word not in ends])


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divides positive scores of tokens in the text by `penalty`, multiplies negative ones (arXiv:1909.05858, 4.1)."""

    penalty: float

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        rows, columns = np.nonzero(prefix.real_RS)
        tokens = prefix.ids_RS[rows, columns]
        scores = scores_RV[rows, tokens]  # a token that occurs twice is read before it is written
        penalty = np.float32(self.penalty)
        scores_RV[rows, tokens] = np.where(scores < 0, scores * penalty, scores / penalty)
        return scores_RV


@dataclass(frozen=True)
class NoRepeatNGram:
    """Bans each token that would complete an n-gram of the text once more."""

    size: int

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        windows = prefix.ids_RS.shape[1] - self.size + 1
        if windows > 0:
            found_RW = np.arange(windows) >= prefix.starts_R[:, None]
            for place in range(self.size - 1):  # the newest tokens, compared with those at each place of a window
                newest_R1 = prefix.ids_RS[:, windows + place, None]
                found_RW &= prefix.ids_RS[:, place : place + windows] == newest_R1
            rows, columns = np.nonzero(found_RW)
            scores_RV[rows, prefix.ids_RS[rows, columns + self.size - 1]] = -np.inf
        return scores_RV


@dataclass(frozen=True)
class NoTokensUntil:
    """Bans `tokens` while a text has fewer than `columns` columns: a minimal length, when they are those of its end."""

    tokens: Sequence[int]
    columns: int

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        if prefix.ids_RS.shape[1] < self.columns:
            scores_RV[:, list(self.tokens)] = -np.inf
        return scores_RV


@dataclass(frozen=True)
class NoTokensAt:
    """Bans `tokens` as the new token that follows `columns` columns; everywhere where that is None."""

    tokens: Sequence[int]
    columns: int | None = None

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        if self.columns is None or prefix.ids_RS.shape[1] == self.columns:
            scores_RV[:, list(self.tokens)] = -np.inf
        return scores_RV


@dataclass(frozen=True)
class OnlyTokensAt:
    """After `columns` columns only `tokens` are left, with score 0: a forced beginning or end."""

    tokens: Sequence[int]
    columns: int

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        if prefix.ids_RS.shape[1] == self.columns:
            scores_RV[:] = -np.inf
            scores_RV[:, list(self.tokens)] = 0
        return scores_RV


@dataclass(frozen=True)
class AllowedTokens:
    """Leaves the tokens that `allowed(prompt index, ids of the row)` lists (`prefix_allowed_tokens_fn`)."""

    allowed: Callable[[int, np.ndarray], Sequence[int]]

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        barred_RV = np.full_like(scores_RV, -np.inf)
        for row, prompt in enumerate(prefix.prompts_R.tolist()):
            tokens = np.asarray(self.allowed(prompt, prefix.ids_RS[row]), np.int64)
            if not len(tokens):
                raise InputError("generate", [f"prefix_allowed_tokens_fn: no token allowed for prompt {prompt}"])
            barred_RV[row, tokens] = 0
        return scores_RV + barred_RV


@dataclass(frozen=True)
class GrowingEndBias:
    """Raises the score s of each id that ends texts by |s| (factor^k - 1), k columns after `start` columns."""

    tokens: Sequence[int]
    start: int
    factor: float

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        beyond = prefix.ids_RS.shape[1] - self.start
        if beyond > 0:
            ends_RE = scores_RV[:, list(self.tokens)]
            scores_RV[:, list(self.tokens)] = ends_RE + np.abs(ends_RE) * np.float32(self.factor**beyond - 1)
        return scores_RV


def remove_invalid_values(prefix: Prefix, scores_RV: Scores) -> Scores:
    """NaN becomes 0, infinities the largest and smallest finite numbers."""
    return np.nan_to_num(scores_RV, copy=False, nan=0.0)


def renormalize(prefix: Prefix, scores_RV: Scores) -> Scores:
    """Log-probabilities of the tokens that are left."""
    return log_softmax(scores_RV)


@dataclass(frozen=True)
class UserProcessor:
    """A callable of the caller: (ids [R, S] int64, scores [R, V] float32) -> scores [R, V], all NumPy.

    Rows of ids are right-aligned, with the padding id before a text begins. What a processor does to one row must not
    depend on the others, and it may be called with any number of rows.
    """

    process: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        processed = np.asarray(self.process(prefix.ids_RS, scores_RV))
        if processed.shape != scores_RV.shape:
            problem = f"logits_processor: expected scores of shape {scores_RV.shape}, got {processed.shape}"
            raise InputError("generate", [problem])
        return processed.astype(np.float32, copy=False)
