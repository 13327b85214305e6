"""The float64 attention that every kernel is compared with, and the bound of its error."""

import numpy as np
import pytest
from attention_truth import (
    DTYPES,
    Attended,
    attention_inputs,
    attention_truth,
    check_bound,
    error_bound,
    root_mean_square_error,
    visible_slots,
    worst_share,
)
from harness import NUMPY_DTYPES

B, N, T, S, H = 2, 3, 5, 11, 7
FIRST_BT = np.array([[0, 0, 2, 2, 4], [0, 1, 1, 1, 1]])
LENGTHS_B = np.array([6, 2])


def test_visible_slots_drawn():
    drawn = ["".join(".x"[int(x)] for x in row) for row in visible_slots(2, 5, 5, FIRST_BT)[0, 0]]
    assert drawn == ["x....", "xx...", "..x..", "..xx.", "....x"]
    drawn = ["".join(".x"[int(x)] for x in row) for row in visible_slots(2, 2, 5, None, [2, 0])[0, 0]]
    assert drawn == ["xxx..", "xxxx."]


@pytest.mark.parametrize("first_BT", [None, FIRST_BT], ids=["one document", "documents"])
@pytest.mark.parametrize("lengths_B", [None, LENGTHS_B], ids=["no cache", "cache"])
def test_gradients_are_those_of_the_output(first_BT, lengths_B):
    """Against differences of the output along a random direction."""
    inputs = [x.astype(float) for x in attention_inputs("float32", B, N, T, H, T if lengths_B is None else S)]
    truth = attention_truth(*inputs[:3], first_BT, lengths_B, inputs[3])
    for i, gradient in enumerate(truth[1:]):
        step = 1e-6 * np.random.default_rng(i).standard_normal(inputs[i].shape)
        higher, lower = (
            attention_truth(*(x + sign * step if j == i else x for j, x in enumerate(inputs[:3])), first_BT, lengths_B)
            for sign in (1, -1)
        )
        assert ((higher.out - lower.out) * inputs[3]).sum() == pytest.approx(2 * (gradient * step).sum(), rel=1e-5)


def test_documents_in_a_row_equal_each_alone():
    q, k, v, d_out = attention_inputs("float32", 1, N, T, H)
    together = attention_truth(q, k, v, [[0, 0, 2, 2, 2]], d_out=d_out)
    parts = [attention_truth(*(x[:, :, a:b] for x in (q, k, v)), d_out=d_out[:, :, a:b]) for a, b in ((0, 2), (2, 5))]
    for got, *alone in zip(together, *parts, strict=True):
        np.testing.assert_allclose(got, np.concatenate(alone, axis=2), atol=1e-14)


def in_dtype(dtype, q, k, v, d_out, *, rounded_scores=False, lost_slot=False):
    """Attention with sums in float32 and results rounded to `dtype`, and two ways to do it wrong."""
    f32 = [x.astype(np.float32) for x in (q, k, v, d_out)]
    scores = f32[0] @ f32[1].swapaxes(-1, -2)
    scores = scores.astype(NUMPY_DTYPES[dtype]).astype(np.float32) if rounded_scores else scores
    visible = visible_slots(len(q), q.shape[2], k.shape[2])
    if lost_slot:
        visible = visible & ~np.eye(k.shape[2], dtype=bool)[7]
        visible[..., 7, 7] = True
    scores = np.where(visible, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = p @ f32[2]
    d_s = p * (f32[3] @ f32[2].swapaxes(-1, -2) - (f32[3] * out).sum(-1, keepdims=True))
    p_T, d_s_T = p.swapaxes(-1, -2), d_s.swapaxes(-1, -2)
    return Attended(*(x.astype(NUMPY_DTYPES[dtype]) for x in (out, d_s @ f32[1], d_s_T @ f32[0], p_T @ f32[3])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 4])
def test_rounded_arithmetic_is_within_the_bound(dtype, size):
    inputs = attention_inputs(dtype, B, N, 67, 64, size=size)
    got = in_dtype(dtype, *inputs)
    truth = check_bound(got, inputs, dtype)
    assert root_mean_square_error(got, truth)["out"] > 0


@pytest.mark.parametrize(
    ("dtype", "fault"),
    [(dtype, "lost_slot") for dtype in DTYPES] + [(dtype, "rounded_scores") for dtype in ("float16", "bfloat16")],
)
def test_wrong_arithmetic_is_outside_the_bound(dtype, fault):
    """A slot that is not seen; scores rounded to half precision, as TensorFlow's matmul rounds them."""
    inputs = attention_inputs(dtype, B, N, 67, 64, size=4)
    got = in_dtype(dtype, *inputs, **{fault: True})
    bound = error_bound(*inputs[:3], dtype, d_out=inputs[3])
    shares = worst_share(got, attention_truth(*inputs[:3], d_out=inputs[3]), bound)
    assert min(shares["out"], shares["d_v"]) > 1, shares


def test_a_nan_is_outside_the_bound():
    inputs = attention_inputs("float32", B, N, T, H)
    truth, bound = attention_truth(*inputs[:3]), error_bound(*inputs[:3], "float32")
    shares = worst_share(Attended(np.full_like(truth.out, np.nan)), truth, bound)
    assert not shares["out"] <= 1


@pytest.mark.parametrize("part", Attended._fields)
def test_a_nan_in_any_part_is_found(part):
    inputs = attention_inputs("float32", B, N, T, H)
    truth = attention_truth(*inputs[:3], d_out=inputs[3])
    check_bound(truth, inputs, "float32")
    with pytest.raises(AssertionError, match=f"'{part}': nan"):
        check_bound(truth._replace(**{part: np.full_like(getattr(truth, part), np.nan)}), inputs, "float32")
