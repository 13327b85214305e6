"""Rules that shape the distribution of sampling: temperature, and the cuts that leave its likely or typical part.

Semantics: the warpers of Hugging Face transformers 4.57.6 (generation/logits_process.py). One difference: tokens with
equal scores are kept or removed together, there an unstable sort decides which of them go; so the tokens that are left
do not depend on the order of the vocabulary. Removed tokens have score minus infinity. `keep` tokens are always left:
one, or in beam sampling one more than there are ids that end texts.
"""

from dataclasses import dataclass

import numpy as np

from opt_core.prefix import Prefix
from opt_core.sampling import largest, softmax

Scores = np.ndarray  # [R, V] float32


@dataclass(frozen=True)
class Temperature:
    temperature: float

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        with np.errstate(over="ignore"):  # a score near the largest float32 becomes infinite, as it should
            scores_RV /= np.float32(self.temperature)
        return scores_RV


@dataclass(frozen=True)
class TopK:
    """The k largest scores, and those equal to the last of them."""

    k: int
    keep: int = 1

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        return _removed(scores_RV, scores_RV < _nth_largest(scores_RV, max(self.k, self.keep)))


@dataclass(frozen=True)
class TopP:
    """The smallest set of largest probabilities whose sum reaches `p` (arXiv:1904.09751): a token is removed when it
    and all less likely ones sum to 1 - p or less."""

    p: float
    keep: int = 1

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        least_R = np.array([self._least_kept(scores_V) for scores_V in scores_RV])
        least_R1 = np.minimum(least_R[:, None], _nth_largest(scores_RV, self.keep))
        return _removed(scores_RV, scores_RV < least_R1)

    def _least_kept(self, scores_V: np.ndarray) -> np.float32:
        weights_V = np.exp(scores_V - scores_V.max())
        total = weights_V.sum(dtype=np.float64)
        # Tokens below an equal share of what may go all go.
        left = np.flatnonzero(weights_V > total * (1 - self.p) / len(weights_V))
        if not len(left):
            return scores_V.max()
        return scores_V[left[_reaching(-scores_V[left].astype(np.float64), weights_V[left], total * self.p)]]


@dataclass(frozen=True)
class MinP:
    """Probabilities of at least `p` times the largest (arXiv:2407.01082)."""

    p: float
    keep: int = 1

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        weights_RV = np.exp(scores_RV - scores_RV.max(-1, keepdims=True))
        removed_RV = (weights_RV < np.float32(self.p)) & (scores_RV < _nth_largest(scores_RV, self.keep))
        return _removed(scores_RV, removed_RV)


@dataclass(frozen=True)
class Typical:
    """Tokens whose surprise is nearest to the entropy, until their probabilities sum to `mass` (arXiv:2202.00666)."""

    mass: float
    keep: int = 1

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        for scores_V in scores_RV:
            left = np.flatnonzero(scores_V > -np.inf)
            if not len(left):
                continue
            logs = scores_V[left].astype(np.float64) - scores_V.max()
            weights = np.exp(logs)
            total = weights.sum()
            distances = np.abs(logs - weights @ logs / total)  # of the surprise from the entropy
            most = distances[_reaching(distances, weights, total * self.mass)]
            if self.keep > 1:
                most = max(most, np.sort(distances)[: self.keep][-1])
            kept = left[np.flatnonzero(distances <= most)]  # mostly few
            kept_scores = scores_V[kept]
            scores_V[:] = -np.inf
            scores_V[kept] = kept_scores
        return scores_RV


@dataclass(frozen=True)
class Epsilon:
    """Probabilities of at least `epsilon` (arXiv:2210.15191)."""

    epsilon: float
    keep: int = 1

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        removed_RV = (softmax(scores_RV) < self.epsilon) & (scores_RV < _nth_largest(scores_RV, self.keep))
        return _removed(scores_RV, removed_RV)


@dataclass(frozen=True)
class Eta:
    """Probabilities of at least min(epsilon, sqrt(epsilon) exp(-entropy)) (arXiv:2210.15191)."""

    epsilon: float
    keep: int = 1

    def __call__(self, prefix: Prefix, scores_RV: Scores) -> Scores:
        probabilities_RV = softmax(scores_RV)
        logs_RV = np.log(np.maximum(probabilities_RV, np.finfo(np.float64).tiny))
        entropy_R1 = -(probabilities_RV * logs_RV).sum(-1, keepdims=True)
        least_R1 = np.minimum(self.epsilon, np.sqrt(self.epsilon) * np.exp(-entropy_R1))
        removed_RV = (probabilities_RV < least_R1) & (scores_RV < _nth_largest(scores_RV, self.keep))
        return _removed(scores_RV, removed_RV)


def _reaching(keys_X: np.ndarray, weights_X: np.ndarray, mass: float) -> int:
    """Where the key is with which the weights of all keys up to it reach `mass`; the largest, if none does.

    Few keys are sorted: the sums of bins, a sixteenth wide, tell in which of them `mass` is reached.
    """
    scaled_X = keys_X - keys_X.min()
    scaled_X *= 16
    bins_X = np.minimum(scaled_X, 1023, out=scaled_X).astype(np.intp)
    sums = np.cumsum(np.bincount(bins_X, weights_X))
    chosen = min(int(np.count_nonzero(sums < mass)), len(sums) - 1)
    inside = np.flatnonzero(bins_X == chosen)
    inside = inside[np.argsort(keys_X[inside])]
    sums_inside = np.cumsum(weights_X[inside], dtype=np.float64) + (sums[chosen - 1] if chosen else 0)
    return int(inside[min(int(np.count_nonzero(sums_inside < mass)), len(inside) - 1)])


def _nth_largest(scores_RV: Scores, n: int) -> np.ndarray:
    """The n-th largest score [R, 1] of each row, or the least where there are fewer."""
    if n == 1:
        return scores_RV.max(-1, keepdims=True)
    return np.array([scores_V[largest(scores_V, n)[-1:]] for scores_V in scores_RV])


def _removed(scores_RV: Scores, removed_RV: np.ndarray) -> Scores:
    scores_RV[removed_RV] = -np.inf
    return scores_RV
