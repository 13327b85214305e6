"""Reproducible sampling: which random number decides which token, the same in every framework.

The law. Sequence j of prompt i takes its random numbers at step t (its t-th new token, from 0) from block (t, 0, j, i)
of Philox on the seed:

    Generator(Philox(key=seed, counter=(t, 0, j, i))).random(4)

    number 0    the token: the first, in the order of ids, whose cumulative probability exceeds the number
    number 1    the token that a draft model proposes for this place
    number 2    whether that proposal is accepted

Beam sampling needs more: its draw n is number n % 4 of block (t, n // 4, 0, i). A list of seeds, one for each prompt,
makes i zero: a prompt then gets the text that it gets alone with its seed, in any batch. With one seed for all, that
holds for prompt 0, and the text of a prompt depends on its place and not on the other prompts.

Logits that agree up to rounding move the borders of the tokens by as little, so they give the same token unless a
number falls between: about once in a million tokens in float32.
Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. NumPy keeps its streams across versions.
"""

from collections.abc import Sequence

import numpy as np

from opt_core.errors import InputError

BLOCK = 4  # numbers of one Philox counter
TOKEN, DRAFT, ACCEPT = range(3)
NO_TOKEN_LEFT = "row {row}: the options and processors leave no token to choose from"


class Uniforms:
    """The numbers in [0, 1) of each row; a row is sequence j of prompt i."""

    def __init__(self, seeds: Sequence[int], prompts: int, sequences: int = 1):
        """`seeds`: one, or one for each of the `prompts`; rows are the prompts, each repeated `sequences` times."""
        if len(seeds) == 1:
            places = [(seeds[0], prompt) for prompt in range(prompts)]
        else:
            places = [(seed, 0) for seed in seeds]
        self.rows = [(seed, j, i) for seed, i in places for j in range(sequences)]

    def at(self, row: int, step: int, count: int = BLOCK) -> np.ndarray:
        """The first `count` numbers of a row at a step, float64."""
        seed, j, i = self.rows[row]
        blocks = [
            np.random.Generator(np.random.Philox(key=seed, counter=(step, q, j, i))).random(BLOCK)
            for q in range(-(-count // BLOCK))
        ]
        return np.concatenate(blocks)[:count]

    def tokens(self, step: int) -> np.ndarray:
        """The number [R] that decides the token of each row."""
        return np.array([self.at(row, step)[TOKEN] for row in range(len(self.rows))])


def choose_best(scores_RV: np.ndarray, live_R: np.ndarray) -> np.ndarray:
    """The token with the largest score, the first of equals.

    Raises:
        InputError: a row of `live_R` has no token with a score above minus infinity.
    """
    tokens_R = scores_RV.argmax(-1)
    best_R = np.take_along_axis(scores_RV, tokens_R[:, None], 1)[:, 0]
    for row in np.flatnonzero(live_R & ~(best_R > -np.inf)):
        raise InputError("generate", [NO_TOKEN_LEFT.format(row=row)])
    return tokens_R


def choose_sampled(scores_RV: np.ndarray, uniforms_R: np.ndarray, live_R: np.ndarray) -> np.ndarray:
    """The token of each row for its number in [0, 1): the first whose cumulative softmax exceeds it. 0 in dead rows.

    Raises:
        InputError: as `choose_best`.
    """
    tokens_R = np.zeros(len(scores_RV), np.int64)
    for row in np.flatnonzero(live_R):
        candidates = np.flatnonzero(scores_RV[row] > -np.inf)
        if not len(candidates):
            raise InputError("generate", [NO_TOKEN_LEFT.format(row=row)])
        scores = scores_RV[row, candidates].astype(np.float64)
        tokens_R[row] = candidates[index_of(np.exp(scores - scores.max()), uniforms_R[row])]
    return tokens_R


def index_of(weights: np.ndarray, uniform: float) -> int:
    """The first index whose cumulative share of `weights` exceeds `uniform`."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return index if index < len(weights) and weights[index] > 0 else int(np.flatnonzero(weights)[-1])


def draw_without_replacement(weights: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Indices, one for each number: each drawn from what the earlier ones left, in the order of drawing.

    Fewer than `len(uniforms)` when fewer weights are positive. The law is that of drawing again until a new index
    comes: P(i after S) = w_i / (sum of w outside S).
    """
    cumulative = np.cumsum(weights, dtype=np.float64)
    drawn: list[int] = []
    left = cumulative[-1]
    for uniform in uniforms[: np.count_nonzero(weights)]:
        place = uniform * left
        for index in sorted(drawn):  # step over what is gone
            if place >= cumulative[index] - weights[index]:
                place += weights[index]
        index = int(np.searchsorted(cumulative, place, side="right"))
        if index >= len(weights) or weights[index] <= 0 or index in drawn:  # rounding at a border
            index = next(i for i in np.argsort(-weights, kind="stable") if int(i) not in drawn)
        drawn.append(int(index))
        left -= weights[index]
    return np.array(drawn, np.int64)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis in float64; minus infinity has probability 0."""
    exponentials = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-softmax over the last axis in float32, its sum in float64."""
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
