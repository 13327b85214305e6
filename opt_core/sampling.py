"""Reproducible sampling: which random numbers decide which token, the same in every framework.

The law. At step t (its t-th new token, from 0) sequence j of prompt i, or beam j of it, takes one number u(v) in [0, 1)
for each token v of the vocabulary: the first V doubles of NumPy's Philox on the seed,

    Generator(Philox(key=seed, counter=(0, t, j, i))).random(V)

and the token is the one with the largest score(v) - log(-log(u(v))), the first of equals. That is a sample of the
softmax of the scores (Gumbel 1954), and the k largest are k samples without replacement (arXiv:1903.06059). A list of
seeds, one for each prompt, makes i zero: a prompt then gets the text that it gets alone with its seed, in any batch.
With one seed for all, that holds for prompt 0, and the text of a prompt depends on its place, not on other prompts.

Why not one number for a row, and the token found in the cumulative distribution: rounding of the logits shifts all
borders between tokens, and there are many. Scores of 50,272 tokens that differ by 3e-6, as those of two frameworks do,
gave another token for 1 to 8 numbers in 1,000 (2 to 90 in 10,000 with tokens sorted by probability); here for about as
many as the scores differ by: some in a million. And what a draft model proposes with the same numbers is mostly what
the model itself would choose, so that drafts change no sampled text (`opt_core.assisted`).
Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. NumPy keeps its stream across versions.
"""

from collections.abc import Sequence

import numpy as np

from opt_core.errors import InputError

NO_TOKEN_LEFT = "row {row}: the options and processors leave no token to choose from"


class Noise:
    """The random numbers of each row; a row is sequence j of prompt i."""

    def __init__(self, seeds: Sequence[int], prompts: int, sequences: int = 1):
        """`seeds`: one, or one for each of the `prompts`; rows are the prompts, each repeated `sequences` times."""
        if len(seeds) == 1:
            places = [(seeds[0], prompt) for prompt in range(prompts)]
        else:
            places = [(seed, 0) for seed in seeds]
        self.rows = [(seed, j, i) for seed, i in places for j in range(sequences)]

    def at(self, row: int, step: int, tokens: np.ndarray) -> np.ndarray:
        """The numbers of some tokens, ids in rising order, for a row at a step; float64 in [0, 1)."""
        seed, j, i = self.rows[row]
        words = np.random.Philox(key=seed, counter=(0, step, j, i)).random_raw(int(tokens[-1]) + 1)[tokens]
        return (words >> 11) * 2.0**-53  # as `Generator.random`, whose stream NumPy does not promise to keep

    def perturbed(self, row: int, step: int, scores_V: np.ndarray) -> np.ndarray:
        """The scores [V] that decide, float64: score - log(-log(u)); minus infinity stays."""
        left = np.flatnonzero(scores_V > -np.inf)
        perturbed_V = np.full(len(scores_V), -np.inf)
        if len(left):
            with np.errstate(divide="ignore"):  # of u = 0
                perturbed_V[left] = scores_V[left] - np.log(-np.log(self.at(row, step, left)))
        return perturbed_V


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


def choose_sampled(scores_RV: np.ndarray, noise: Noise, step: int, live_R: np.ndarray) -> np.ndarray:
    """A sample of the softmax of each row's scores, by the law above; 0 in rows that are not in `live_R`.

    Raises:
        InputError: as `choose_best`.
    """
    perturbed_RV = np.zeros(scores_RV.shape)
    for row in np.flatnonzero(live_R).tolist():
        perturbed_RV[row] = noise.perturbed(row, step, scores_RV[row])
    return choose_best(perturbed_RV, live_R)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis in float64; minus infinity has probability 0."""
    exponentials = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-softmax over the last axis in float32, its sum in float64."""
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
