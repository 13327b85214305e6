"""Greedy text of a backend against the float64 reference, and of the backends against each other.

A text is judged token by token: given the tokens before it, is this one the reference's most likely token? Another
token is allowed only at a tie, where rounding may move both logits past each other. So a text that went another way
after a tie is judged as well, and two backends that pass can differ only from a tie on.
"""

from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from opt_core.reference import Reference
from opt_zoo.comparison import Bounds, top1
from opt_zoo.parity_cases import Case


@dataclass
class GreedyText:
    """The new tokens of one backend for the left-padded batch of prompts."""

    backend: str
    dtype: str
    attn_implementation: str
    tokens: list[list[int]]  # [B][n], up to the end of each text
    judged: int  # tokens in all
    ties: int  # tokens that are not the reference's first choice, but tie with it
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


@dataclass
class Agreement:
    """Two backends' texts, same dtype and attention."""

    backends: tuple[str, str]
    dtype: str
    attn_implementation: str
    equal: bool
    first_difference: str | None


def judge_text(
    tokens_BS: np.ndarray,
    prompts: Case,
    reference: Reference,
    bounds: Bounds,
    *,
    backend: str,
    dtype: str,
    attn_implementation: str,
) -> GreedyText:
    """Judges `tokens_BS`, prompts included, by one pass of the reference over them."""
    T, new_Bn = prompts.input_ids.shape[1], tokens_BS[:, prompts.input_ids.shape[1] :]
    counted_Bn = _up_to_end(new_Bn, reference.config.eos_token_ids)
    mask_BS = np.concatenate([prompts.real_BT, counted_Bn], axis=1)
    out = reference(tokens_BS[:, :-1], mask_BS[:, :-1])  # the last token predicts nothing and may have no position
    logits_RV = reference.logits(out.last_hidden_state[:, T - 1 :][counted_Bn])
    chosen_R = np.zeros_like(logits_RV)
    chosen_R[np.arange(len(logits_RV)), new_Bn[counted_Bn]] = 1
    agrees_R, ties_R = top1(chosen_R, logits_RV, bounds)
    text = [row[counted].tolist() for row, counted in zip(new_Bn, counted_Bn, strict=True)]
    problems = _prompt_problems(tokens_BS[:, :T], prompts)
    if not agrees_R.all():
        row, step = np.argwhere(counted_Bn)[np.flatnonzero(~agrees_R)[0]]
        problems.append(f"tokens: row {row}, token {step} is not the reference's choice, and no tie: "
                        f"{int((~agrees_R).sum())} of {len(agrees_R)} such tokens")  # fmt: skip
    return GreedyText(backend, dtype, attn_implementation, text, len(agrees_R), int(ties_R.sum()), problems)


def _up_to_end(new_Bn: np.ndarray, eos_token_ids: tuple[int, ...]) -> np.ndarray:
    """True up to and including the first end-of-text token of each row."""
    ended_Bn = np.isin(new_Bn, eos_token_ids)
    return np.cumsum(ended_Bn, axis=1) - ended_Bn == 0


def _prompt_problems(got_BT: np.ndarray, prompts: Case) -> list[str]:
    return [] if np.array_equal(got_BT, prompts.input_ids) else ["tokens: expected the prompts first, got other tokens"]


def compare_texts(texts: list[GreedyText]) -> list[Agreement]:
    """Every pair of backends with the same dtype and attention."""
    return [
        Agreement((a.backend, b.backend), a.dtype, a.attn_implementation, a.tokens == b.tokens, _first_difference(a, b))
        for a, b in combinations(texts, 2)
        if (a.dtype, a.attn_implementation) == (b.dtype, b.attn_implementation)
    ]


def _first_difference(a: GreedyText, b: GreedyText) -> str | None:
    for row, (left, right) in enumerate(zip(a.tokens, b.tokens, strict=True)):
        for step, (x, y) in enumerate(zip(left, right)):  # noqa: B905 - texts may end early
            if x != y:
                return f"row {row}, token {step}: {a.backend} {x}, {b.backend} {y}"
        if len(left) != len(right):
            return f"row {row}, token {min(len(left), len(right))}: one text ends"
    return None
