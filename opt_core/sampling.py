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
        """The numbers of some tokens for a row at a step; float64 in [0, 1)."""
        return _as_uniform(self._words(row, step, int(tokens.max()) + 1)[tokens])

    def drawn(self, rows: Sequence[int], step: int, scores_QV: np.ndarray, number: int) -> np.ndarray:
        """The `number` largest of score - log(-log u), as indices into all scores of `rows`, largest first.

        Equal ones are in their order; NaN is never among them.
        """
        indices, values = self._contenders(rows, step, scores_QV, number)
        return indices[np.argsort(-values, kind="stable")[:number]]

    def _contenders(
        self, rows: Sequence[int], step: int, scores_QV: np.ndarray, number: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `number` largest values and some more, with their indices, which rise.

        Two logarithms for each of 50,272 tokens would take half a millisecond a row, so only those are computed that
        can win: of tokens with a high score, and of those with one of the 1 in 256 highest numbers.
        """
        least = float(np.fmax.reduce(scores_QV, axis=None)) - _NEAR
        for _ in range(2):  # the second time, if at all, with what the first has shown to be enough
            found = [self._values(row, step, scores_V, least) for row, scores_V in zip(rows, scores_QV, strict=True)]
            values = np.concatenate([values for _, values in found])
            reached = np.partition(values, -number)[-number] if len(values) >= number else -np.inf
            if reached >= least + _MOST:
                break
            least = reached - _MOST
        indices = np.concatenate([place * scores_QV.shape[1] + tokens for place, (tokens, _) in enumerate(found)])
        return indices, values

    def sampled(self, row: int, step: int, scores_V: np.ndarray) -> int:
        """A sample of the softmax of the scores; any token where none has a score above minus infinity."""
        tokens, values = self._contenders([row], step, scores_V[None], 1)
        return int(tokens[values.argmax()]) if len(tokens) else 0

    def _values(self, row: int, step: int, scores_V: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
        """The tokens with a rare number or a score of at least `least`, and their score - log(-log u)."""
        words_V = self._words(row, step, len(scores_V))
        is_near_V = (words_V > _RARE) & (scores_V > -np.inf)
        is_near_V |= scores_V >= np.nextafter(scores_V.dtype.type(least), -np.inf)
        tokens = np.flatnonzero(is_near_V)
        with np.errstate(divide="ignore"):  # of u = 0
            return tokens, scores_V[tokens] - np.log(-np.log(_as_uniform(words_V[tokens])))

    def _words(self, row: int, step: int, number: int) -> np.ndarray:
        seed, j, i = self.rows[row]
        return np.random.Philox(key=seed, counter=(0, step, j, i)).random_raw(number)


_RARE = np.uint64(255 << 56)  # one word in 256 is larger
_MOST = 5.55  # a bound on -log(-log u) of the others, which is 5.543 at u = 255 / 256
_NEAR = 8.0  # a token so far below the best one hardly ever wins unless its number is rare


def _as_uniform(words: np.ndarray) -> np.ndarray:
    return (words >> 11) * 2.0**-53  # as `Generator.random`, whose stream NumPy does not promise to keep


def largest(values_X: np.ndarray, number: int) -> np.ndarray:
    """The indices of the largest numbers, largest first, equal ones in their order; NaN is less than any."""
    number = min(number, len(values_X))
    near = np.flatnonzero(~(values_X < _bound_on_largest(values_X, number)))
    return near[np.argsort(-values_X[near], kind="stable")[:number]]


def _bound_on_largest(values_X: np.ndarray, number: int) -> np.ndarray:
    """What at least `number` of the values reach, and few more: the maxima of groups tell, with a tenth of the work."""
    groups = len(values_X) // 32
    if groups >= number:
        values_X = values_X[: 32 * groups].reshape(32, groups).max(0)
    return np.partition(values_X, -number)[-number]


def choose_best(scores_RV: np.ndarray, live_R: np.ndarray) -> np.ndarray:
    """The token with the largest score, the first of equals.

    Raises:
        InputError: a row of `live_R` has no token with a score above minus infinity.
    """
    tokens_R = scores_RV.argmax(-1)
    _check_a_token_is_left(scores_RV, tokens_R, live_R)
    return tokens_R


def choose_sampled(scores_RV: np.ndarray, noise: Noise, step: int, live_R: np.ndarray) -> np.ndarray:
    """A sample of the softmax of each row's scores, by the law above; 0 in rows that are not in `live_R`.

    Raises:
        InputError: as `choose_best`.
    """
    tokens_R = np.zeros(len(scores_RV), np.int64)
    for row in np.flatnonzero(live_R).tolist():
        tokens_R[row] = noise.sampled(row, step, scores_RV[row])
    _check_a_token_is_left(scores_RV, tokens_R, live_R)
    return tokens_R


def _check_a_token_is_left(scores_RV: np.ndarray, tokens_R: np.ndarray, live_R: np.ndarray) -> None:
    chosen_R = np.take_along_axis(scores_RV, tokens_R[:, None], 1)[:, 0]
    for row in np.flatnonzero(live_R & ~(chosen_R > -np.inf)):
        raise InputError("generate", [NO_TOKEN_LEFT.format(row=row)])


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis in float64; minus infinity has probability 0."""
    exponentials = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def log_softmax(scores_RV: np.ndarray) -> np.ndarray:
    """Log-softmax of each row in float32, its sum in float64."""
    logs_RV, weights_V = np.empty_like(scores_RV), np.empty_like(scores_RV[0])
    for scores_V, logs_V in zip(scores_RV, logs_RV, strict=True):  # a row stays in the cache of a core
        np.subtract(scores_V, scores_V.max(), out=logs_V)
        logs_V -= np.log(np.exp(logs_V, out=weights_V).sum(dtype=np.float64)).astype(np.float32)
    return logs_RV
