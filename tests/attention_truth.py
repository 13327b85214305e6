"""Causal attention in float64 NumPy, its gradients in closed form, and how far a right implementation may be from them.

The queries are scaled already, as in the backends. Queries are [B, N, T, H], keys and values [B, N, S, H],
of any dtype: what is compared must start from the same rounded numbers.
"""

from typing import NamedTuple

import numpy as np
from harness import NUMPY_DTYPES, ROUNDOFF

DTYPES = tuple(ROUNDOFF)
ACCUMULATION = 2.0**-24  # sums are float32 at least
# What a number may lose below the smallest normal one: all of it where denormals are flushed, as JAX and TensorFlow do.
UNDERFLOW = {"float32": 2.0**-126, "float16": 2.0**-25, "bfloat16": 2.0**-126}
# The bound is the worst case over all roundings, linear in the number of terms. Sums over tiles and vectors stay far
# below it: measured at most 0.03 of it in float32. In half precision the last rounding alone makes up most of it.
SHARE = {"float32": 1 / 16, "float16": 1.0, "bfloat16": 1.0}


class Attended(NamedTuple):
    """An output with its gradients, or the bound of the error of each."""

    out: np.ndarray
    d_q: np.ndarray | None = None
    d_k: np.ndarray | None = None
    d_v: np.ndarray | None = None


class _Steps(NamedTuple):
    """What the truth and the bound both need, in float64."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    visible: np.ndarray  # [B, 1, T, S] True: query t may attend to slot s
    p: np.ndarray  # weights
    out: np.ndarray


def attention_inputs(dtype: str, B, N, T, H, S=None, *, size=1.0, seed=0) -> tuple[np.ndarray, ...]:
    """Random q [B, N, T, H], k and v [B, N, S, H] (S: T), d_out [B, N, T, H] in `dtype`; scores have deviation size^2.

    At a size of 4 the softmax is nearly a choice of one slot.
    """
    rng, S = np.random.default_rng(seed), T if S is None else S
    shapes, sizes = ((B, N, T, H), (B, N, S, H), (B, N, S, H), (B, N, T, H)), (size * H**-0.5, size, 1, 1)
    return tuple((rng.standard_normal(s) * x).astype(NUMPY_DTYPES[dtype]) for s, x in zip(shapes, sizes, strict=True))


def far_below_zero(dtype: str, B, N, T, H) -> tuple[np.ndarray, ...]:
    """Inputs as above with scores near -120, of which cuDNN made NaN (https://github.com/pytorch/pytorch/issues/196678).

    The gradient of the first feature of queries is 0 but for rounding: the bound holds there, twice eager's error not.
    """
    q, k, v, d_out = attention_inputs(dtype, B, N, T, H)
    q, k = ((x.astype(np.float32) * 0.3).astype(NUMPY_DTYPES[dtype]) for x in (q, k))
    q[..., 0], k[..., 0] = 1, -120
    return q, k, v, d_out


def visible_slots(B: int, T: int, S: int, first_BT=None, lengths_B=None) -> np.ndarray:
    """True where query t sees slot s, [B, 1, T, S]: first_BT[b, t] <= s <= t, or <= lengths_B[b] + t behind a cache."""
    last_BT = np.arange(T) + (np.zeros((B, 1), int) if lengths_B is None else np.asarray(lengths_B)[:, None])
    first_BT = np.zeros((B, T), int) if first_BT is None else np.asarray(first_BT)
    slots_S = np.arange(S)
    return ((first_BT[..., None] <= slots_S) & (slots_S <= last_BT[..., None]))[:, None]


def attention_truth(q, k, v, first_BT=None, lengths_B=None, d_out=None) -> Attended:
    """softmax(q k^T) v over the visible slots; with the cotangent `d_out` also the gradients.

    With P the weights and dP = dO V^T: dV = P^T dO, dS = P * (dP - rowsum(dO * O)), dQ = dS K, dK = dS^T Q
    (Dao et al., arXiv:2205.14135, appendix B).
    """
    x = _steps(q, k, v, first_BT, lengths_B)
    if d_out is None:
        return Attended(x.out)
    d_out = _float64(d_out)
    d_s = x.p * (d_out @ _t(x.v) - (d_out * x.out).sum(-1, keepdims=True))
    return Attended(x.out, d_s @ x.k, _t(d_s) @ x.q, _t(x.p) @ d_out)


def error_bound(q, k, v, dtype: str, first_BT=None, lengths_B=None, d_out=None) -> Attended:
    """The largest error that an implementation in `dtype` may have at each element, sums being in float32.

    With u the roundoff of `dtype`, w that of float32, a the largest |q| |k| of a row and n its visible slots, each
    weight has the relative error r = (2 H a + 4 + n) w before it is rounded to `dtype`, and so

        |out - truth| <= (r + u) P|v| + u |out|

    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); the gradients follow from it term by term.
    """
    x, H = _steps(q, k, v, first_BT, lengths_B), q.shape[-1]
    u, w, tiny = SHARE[dtype] * ROUNDOFF[dtype], SHARE[dtype] * ACCUMULATION, UNDERFLOW[dtype]
    n = x.visible.sum(-1, keepdims=True)
    a = np.where(x.visible, np.abs(x.q) @ _t(np.abs(x.k)), 0).max(-1, keepdims=True)
    r = (2 * H * a + 4 + n) * w
    out = (r + u) * (x.p @ np.abs(x.v)) + u * np.abs(x.out) + tiny * (x.visible @ np.abs(x.v) + 1)
    if d_out is None:
        return Attended(out)
    d_out = _float64(d_out)
    d_p, delta = d_out @ _t(x.v), (d_out * x.out).sum(-1, keepdims=True)
    size_p = np.abs(d_out) @ _t(np.abs(x.v))
    size_delta = (np.abs(d_out) * np.abs(x.out)).sum(-1, keepdims=True)
    error_delta = (np.abs(d_out) * out).sum(-1, keepdims=True) + (H * w + u) * size_delta
    error_s = x.p * ((r + 2 * u) * np.abs(d_p - delta) + (H * w + u) * size_p + error_delta) + tiny * x.visible
    size_s, terms = np.abs(x.p * (d_p - delta)), x.visible.sum(-2, keepdims=True).swapaxes(-1, -2)
    d_q = (error_s + n * w * size_s) @ np.abs(x.k)
    d_k = _t(error_s) @ np.abs(x.q) + terms * w * (_t(size_s) @ np.abs(x.q))
    d_v = _t((r + u) * x.p + tiny * x.visible) @ np.abs(d_out) + terms * w * (_t(x.p) @ np.abs(d_out))
    truth = attention_truth(q, k, v, first_BT, lengths_B, d_out)
    rounded = (bound + u * np.abs(t) + tiny for bound, t in zip((d_q, d_k, d_v), truth[1:], strict=True))
    return Attended(out, *rounded)


def worst_share(got: Attended, truth: Attended, bound: Attended) -> dict[str, float]:
    """The largest error of each part in units of its bound: at most 1 for a right implementation."""
    shares = {}
    for name, x, t, b in zip(Attended._fields, got, truth, bound, strict=True):
        if x is not None:
            error = np.abs(_float64(x) - t)
            shares[name] = float(np.where(error <= 0, 0, error / np.where(b > 0, b, 1e-300)).max())  # NaN stays NaN
    return shares


def check_bound(got: Attended, inputs, dtype: str, first_BT=None, lengths_B=None) -> Attended:
    """Asserts that each number is within the bound, none of them NaN; returns the truth.

    `inputs` are q, k, v, and for gradients d_out.
    """
    given = first_BT, lengths_B, None if got.d_q is None else inputs[3]
    truth = attention_truth(*inputs[:3], *given)
    shares = worst_share(got, truth, error_bound(*inputs[:3], dtype, *given))
    assert all(share <= 1 for share in shares.values()), shares  # not the largest: max may pass over NaN
    return truth


def root_mean_square_error(got: Attended, truth: Attended) -> dict[str, float]:
    """Of each part."""
    parts = zip(Attended._fields, got, truth, strict=True)
    return {name: float(np.sqrt(np.square(_float64(x) - t).mean())) for name, x, t in parts if x is not None}


def beyond_twice(eager: Attended, got: Attended, truth: Attended, slack: float = 0.0) -> dict[str, tuple[float, float]]:
    """Each part of `got` that errs by more than twice as much as eager's, in the same dtype on the same device.

    Errors are root mean squares; `slack` is what is allowed beside, relative to the root mean square of the truth.
    """
    errors, of_eager = root_mean_square_error(got, truth), root_mean_square_error(eager, truth)
    sizes = root_mean_square_error(Attended(*(None if x is None else np.zeros(()) for x in truth)), truth)
    return {
        name: (error, of_eager[name])
        for name, error in errors.items()
        if not error <= 2 * of_eager[name] + slack * sizes[name]  # true of NaN
    }


def _steps(q, k, v, first_BT, lengths_B) -> _Steps:
    q, k, v = map(_float64, (q, k, v))
    visible = visible_slots(q.shape[0], q.shape[2], k.shape[2], first_BT, lengths_B)
    scores = np.where(visible, q @ _t(k), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return _Steps(q, k, v, visible, p, p @ v)


def _float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _t(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(-1, -2)
