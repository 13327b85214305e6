"""Contrastive search: of the k likeliest tokens the one that is likely and unlike what came before.

Su et al., "A Contrastive Framework for Neural Text Generation", arXiv:2202.06417, equation 5. Token v of the k
likeliest has the score (1 - alpha) p(v) - alpha max_j cos(h_v, h_j), with the last hidden state h_v after v and those
h_j of the text before it. All k are fed at once, as rows of a wider cache; the best one stays.

As in Hugging Face transformers 4.57.6 (TensorFlow class), except that padding is no part of the text before, and that a
token which the rules forbid is never chosen, not even where they leave fewer than k.
"""

from collections.abc import Iterator

import numpy as np

from opt_core.generation_output import Record
from opt_core.generation_request import GenerationRequest
from opt_core.prompting import begun
from opt_core.sampling import choose_best, largest, softmax
from opt_core.stepper import Stepper


def contrastive_tokens(request: GenerationRequest, stepper: Stepper, record: Record) -> Iterator[np.ndarray]:
    """Yields the tokens [R] of each step."""
    plan, alpha = request.plan, request.settings.penalty_alpha
    assert alpha is not None  # or the strategy would be another
    prefix, (logits_RV, hidden_RTE) = begun(request, stepper, output_hidden=True)
    assert hidden_RTE is not None  # asked for
    rows_R, ended_R, length = np.arange(len(logits_RV)), np.zeros(len(logits_RV), bool), plan.input_ids.shape[1]
    context_RSE = np.zeros((len(rows_R), length + plan.max_new_tokens, hidden_RTE.shape[2]), hidden_RTE.dtype)
    context_RSE[:, :length] = _unit(hidden_RTE)
    seen_RS = np.pad(plan.real, ((0, 0), (0, plan.max_new_tokens)), constant_values=True)
    while True:
        scores_RV = record.processed(prefix, logits_RV)
        choose_best(scores_RV, ~ended_R)  # raises where no token is left
        tokens_RK, probabilities_RK = _likeliest(scores_RV, request.settings.top_k)
        width = tokens_RK.shape[1]
        stepper.reorder(np.repeat(rows_R, width))
        out = stepper.step(tokens_RK.reshape(-1, 1), output_hidden=True)
        assert out.hidden is not None
        hidden_RKE = _unit(out.hidden[:, 0]).reshape(*tokens_RK.shape, -1)
        likeness_RKS = hidden_RKE @ context_RSE[:, :length].swapaxes(1, 2)
        likeness_RKS = np.where(seen_RS[:, None, :length], likeness_RKS, -np.inf)
        merit_RK = (1 - alpha) * probabilities_RK - alpha * likeness_RKS.max(-1)
        best_R = np.where(probabilities_RK > 0, merit_RK, -np.inf).argmax(1)
        stepper.reorder(rows_R * width + best_R)
        logits_RV = out.logits[rows_R * width + best_R, 0]
        context_RSE[:, length] = hidden_RKE[rows_R, best_R]
        length += 1
        tokens_R = np.where(ended_R, plan.pad_token_id, tokens_RK[rows_R, best_R])
        prefix = prefix.extended(tokens_R)
        ended_R = ended_R | request.stopping(prefix, record.scores_so_far)
        yield tokens_R
        if ended_R.all():
            return


def _likeliest(scores_RV: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [R, K] with the largest scores, largest first, equal ones by id; and their probabilities."""
    tokens_RK = np.stack([largest(scores_V, number) for scores_V in scores_RV])
    return tokens_RK, np.take_along_axis(softmax(scores_RV), tokens_RK, 1)


def _unit(hidden: np.ndarray) -> np.ndarray:
    """Vectors of length one; zero stays zero."""
    length = np.linalg.norm(hidden, axis=-1, keepdims=True)
    return hidden / np.where(length > 0, length, 1)
