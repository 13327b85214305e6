"""One forward pass of a backend against the float64 reference: how far apart, within which bound, and from where on.

Errors are relative errors of rows, ||d||2 / ||truth||2, in units of the roundoff u of the dtype. The bounds are about
four times what 12-layer models with random weights showed in PyTorch, JAX and TensorFlow (float32: 13 to 20 u, half
precision: 3.2 to 4.3 u).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from opt_core.reference import Reference, causal_lm_loss
from opt_zoo.backends import Outputs
from opt_zoo.parity_cases import Case


class Bounds(NamedTuple):
    """What rounding explains in one dtype."""

    roundoff: float  # u
    row: float  # of the relative error of a row, in u
    entry: float  # of the error of one logit, in u times the root mean square of its row


BOUNDS = {
    "float32": Bounds(2.0**-24, 64, 400),
    "float16": Bounds(2.0**-11, 16, 80),
    "bfloat16": Bounds(2.0**-8, 16, 80),
}


class Truth(NamedTuple):
    """The reference's outputs for one case."""

    logits: np.ndarray  # [B, T, V], zero in padding rows
    hidden_states: tuple[np.ndarray, ...]
    loss: float

    @classmethod
    def of(cls, reference: Reference, case: Case) -> "Truth":
        out = reference(case.input_ids, case.attention_mask)
        logits_BTV = reference.logits(out.last_hidden_state)
        return cls(logits_BTV, out.hidden_states, causal_lm_loss(logits_BTV, case.labels_BT, case.attention_mask))


@dataclass
class Comparison:
    """One cell of the report. `problems` is empty where the cell passed."""

    backend: str
    dtype: str
    attn_implementation: str
    padding: str
    worst_row_u: float  # the largest relative error of a row of logits, in units of roundoff
    bound_u: float
    max_abs: float
    top1_agreement: float  # of the real tokens: the share with the reference's most likely next token, ties included
    top1_ties: int  # tokens with another one, where rounding explains it
    loss: float
    loss_error: float
    loss_bound: float
    first_divergence: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


def compare(
    got: Outputs, truth: Truth, case: Case, *, backend: str, dtype: str, attn_implementation: str
) -> Comparison:
    """Measures and judges one forward pass."""
    bounds, real_BT = BOUNDS[dtype], case.real_BT
    agrees, ties = top1(got.logits[real_BT], truth.logits[real_BT], bounds)
    counted_BT = real_BT[:, :-1] & real_BT[:, 1:]
    # A logit's error moves -log softmax by at most twice as much; the mean moves no more than the mean bound.
    tolerance = 2 * entry_tolerance(truth.logits[:, :-1][counted_BT], bounds)
    cell = Comparison(
        backend=backend,
        dtype=dtype,
        attn_implementation=attn_implementation,
        padding=case.padding,
        worst_row_u=worst_row(got.logits, truth.logits, real_BT) / bounds.roundoff,
        bound_u=bounds.row,
        max_abs=float(np.abs(got.logits - truth.logits).max()),
        top1_agreement=float(agrees.mean()),
        top1_ties=int(ties.sum()),
        loss=got.loss,
        loss_error=abs(got.loss - truth.loss),
        loss_bound=float(tolerance.mean()) if len(tolerance) else 0.0,
    )
    cell.problems = [*_number_problems(got), *_padding_problems(got, real_BT), *_bound_problems(cell)]
    if cell.problems:
        cell.first_divergence = first_divergence(got, truth, real_BT, bounds)
    return cell


def worst_row(got: np.ndarray, truth: np.ndarray, real_BT: np.ndarray) -> float:
    """The largest ||got - truth||2 / ||truth||2 over the rows of real tokens; infinite where one is not a number."""
    error = np.linalg.norm((got - truth)[real_BT], axis=-1)
    size = np.linalg.norm(truth[real_BT], axis=-1)
    relative = error / np.where(size > 0, size, np.finfo(np.float64).tiny)
    return float(np.nan_to_num(relative, nan=np.inf, posinf=np.inf).max(initial=0))


def entry_tolerance(truth_RV: np.ndarray, bounds: Bounds) -> np.ndarray:
    """How far rounding may move a logit of each row, [R]."""
    return bounds.entry * bounds.roundoff * np.sqrt((truth_RV**2).mean(-1))


def top1(got_RV: np.ndarray, truth_RV: np.ndarray, bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """Two bools for each row: the most likely token is the reference's, up to ties; it is another one and a tie.

    A tie: the reference's own logits of the two tokens are closer than rounding may move both.
    """
    if not len(truth_RV):
        return np.ones(1, bool), np.zeros(1, bool)
    rows, chosen, best = np.arange(len(truth_RV)), got_RV.argmax(-1), truth_RV.argmax(-1)
    gap = truth_RV[rows, best] - truth_RV[rows, chosen]
    ties = (chosen != best) & (gap <= 2 * entry_tolerance(truth_RV, bounds))
    return (chosen == best) | ties, ties


def first_divergence(got: Outputs, truth: Truth, real_BT: np.ndarray, bounds: Bounds) -> str | None:
    """In words, the first place whose worst row is beyond the bound; None where all are within it."""
    states = zip((*got.hidden_states, got.logits), (*truth.hidden_states, truth.logits), strict=True)
    for entry, (x, y) in enumerate(states):
        if not worst_row(x, y, real_BT) <= bounds.row * bounds.roundoff:
            return place_in_words(entry, len(truth.hidden_states) - 1)
    return None


def place_in_words(entry: int, layers: int) -> str:
    """What computes an entry of the hidden states of a model of `layers` layers; behind the last one is the head.

    Layers are counted from 0, as in the names of the weights.
    """
    if entry > layers:
        return "head"
    last = entry == layers
    place = "embeddings" if entry == 0 else f"layer {entry - 1}"
    return f"{place}, final norm or project_out" if last else place


def _number_problems(got: Outputs) -> list[str]:
    names = [f"hidden_states[{i}]" for i in range(len(got.hidden_states))] + ["logits"]
    arrays = (*got.hidden_states, got.logits)
    problems = [
        f"{name}: expected numbers, got {int((~np.isfinite(array)).sum())} NaN or infinite"
        for name, array in zip(names, arrays, strict=True)
        if not np.isfinite(array).all()
    ]
    return problems if np.isfinite(got.loss) else [*problems, f"loss: expected a number, got {got.loss}"]


def _padding_problems(got: Outputs, real_BT: np.ndarray) -> list[str]:
    names = [f"hidden_states[{i}]" for i in range(len(got.hidden_states))] + ["logits"]
    return [
        f"{name}: expected zeros in padding rows, got up to {np.abs(array[~real_BT]).max():.3g}"
        for name, array in zip(names, (*got.hidden_states, got.logits), strict=True)
        if (array[~real_BT] != 0).any()
    ]


def _bound_problems(cell: Comparison) -> list[str]:
    problems = []
    if not cell.worst_row_u <= cell.bound_u:
        problems.append(f"logits: expected a worst row within {cell.bound_u:g} u, got {cell.worst_row_u:.4g} u")
    if cell.top1_agreement < 1:
        problems.append(f"top-1: expected the reference's tokens up to ties, got {cell.top1_agreement:.2%} of them")
    if not cell.loss_error <= cell.loss_bound + 2.0**-22 * abs(cell.loss):  # the loss itself is a float32
        problems.append(f"loss: expected an error within {cell.loss_bound:.3g}, got {cell.loss_error:.3g}")
    return problems


def compare_with_eager(cells: list[Comparison]) -> None:
    """Adds a problem where a fused kernel is more than twice as far from the truth as the same backend's eager path.

    Below a quarter of the bound both are the usual rounding noise, whose ratio says nothing.
    """

    def key(cell: Comparison) -> tuple[str, str, str]:
        return cell.backend, cell.dtype, cell.padding

    eager = {key(cell): cell.worst_row_u for cell in cells if cell.attn_implementation == "eager"}
    for cell in cells:
        limit = max(2 * eager.get(key(cell), np.inf), cell.bound_u / 4)
        if cell.attn_implementation != "eager" and cell.worst_row_u > limit:
            cell.problems.append(f"logits: expected at most twice the {eager[key(cell)]:.3g} u of eager attention, "
                                 f"got {cell.worst_row_u:.3g} u")  # fmt: skip
