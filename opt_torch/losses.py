"""Losses of the three tasks, PyTorch: float32 whatever the model's dtype, and 0 where nothing is counted.

That of a language model is `linear_cross_entropy`; here are its targets.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from opt_core.checks import check_has_loss
from opt_core.config import OPTConfig
from opt_core.reference import IGNORED_LABEL
from opt_torch.inputs import as_index

POSITIONS = ("start_positions", "end_positions")


def causal_lm_targets(
    labels_BT: Tensor, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None
) -> Tensor:
    """What token t predicts, label t + 1, as [B, T]; -100 where that is not counted.

    Not counted: labels of -100, predictions at padding, of another document, or of the last token.
    """
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL)
    if attention_mask is not None:
        targets_BT = torch.where(attention_mask != 0, targets_BT, IGNORED_LABEL)
    if segment_ids is not None:
        same_BT = F.pad(segment_ids[:, 1:] == segment_ids[:, :-1], (0, 1))
        targets_BT = torch.where(same_BT, targets_BT, IGNORED_LABEL)
    return targets_BT


def answer_targets(positions_B: Tensor, tokens: int, attention_mask: Tensor | None = None) -> Tensor:
    """The positions [B] in rows of so many tokens; -100 for one at padding, or beyond the row (a truncated answer)."""
    target_BT = positions_B[:, None] == torch.arange(tokens, device=positions_B.device)
    if attention_mask is not None:
        target_BT = target_BT & (attention_mask != 0)
    return torch.where(target_BT.any(1), positions_B, IGNORED_LABEL)


def classification_loss(logits_BK: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Cross entropy, mean squared error, or binary cross entropy with logits, by `problem_type`."""
    if problem_type == "single_label_classification":
        return cross_entropy(logits_BK, labels.reshape(-1))
    logits_BK, labels = _at_least_float32(logits_BK), labels.to(_at_least_float32(logits_BK).dtype)
    if problem_type == "regression":
        return F.mse_loss(logits_BK.reshape(-1), labels.reshape(-1))
    return F.binary_cross_entropy_with_logits(logits_BK, labels)


def question_answering_loss(
    start_BT: Tensor,
    end_BT: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
    attention_mask: Tensor | None = None,
    shares: Sequence[float] = (1.0, 1.0),
) -> Tensor:
    """The mean of the losses of start and end, each a softmax over the real positions of its row.

    A position of -100, one at padding, or one beyond the sequence (a truncated answer) is not counted. Each of the two
    losses, which are means themselves, is multiplied with its share before.
    """
    losses = []
    for logits_BT, positions_B in ((start_BT, starts_B), (end_BT, ends_B)):
        logits_BT = _at_least_float32(logits_BT)
        if attention_mask is not None:
            logits_BT = torch.where(attention_mask != 0, logits_BT, torch.finfo(logits_BT.dtype).min)
        losses.append(cross_entropy(logits_BT, answer_targets(positions_B, logits_BT.shape[1], attention_mask)))
    return (losses[0] * shares[0] + losses[1] * shares[1]) / 2


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of -log softmax(logits)[label] over the labels that are not -100; 0 where all are."""
    logits = _at_least_float32(logits)
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (labels != IGNORED_LABEL).sum().clamp(min=1)


# -- parts of a batch -------------------------------------------------------------------------------------------------


def counted_targets(batch: Mapping[str, Tensor], task: str, config: OPTConfig) -> list[Tensor | int]:
    """How many targets count of each mean that a loss is made of: of one, or of starts and of ends."""
    mask_BT, labels = batch.get("attention_mask"), batch.get("labels")
    if batch.keys() >= set(POSITIONS):
        tokens = (batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]).shape[1]
        targets = [answer_targets(_positions(batch, name), tokens, mask_BT) for name in POSITIONS]
    elif labels is None or _are_all_counted(labels, task, config):
        return [len(next(iter(batch.values())))]
    elif task == "causal-lm":
        targets = [causal_lm_targets(as_index(labels, labels.device), mask_BT, batch.get("segment_ids"))]
    else:
        targets = [as_index(labels, labels.device)]
    return [(x != IGNORED_LABEL).sum() for x in targets]


def part_of_loss(out, part: Mapping[str, Tensor], shares: Sequence[float]) -> Tensor:
    """What a part adds to the loss of the whole batch, by its outputs and its shares of `counted_targets`.

    Raises:
        InputError: there were no labels.
    """
    check_has_loss(out)
    if len(shares) == 1:
        return out.loss * shares[0]
    positions = (_positions(part, name) for name in POSITIONS)
    return question_answering_loss(out.start_logits, out.end_logits, *positions, part.get("attention_mask"), shares)


def _are_all_counted(labels: Tensor, task: str, config: OPTConfig) -> bool:
    dtype = str(labels.dtype).removeprefix("torch.")
    return task == "sequence-classification" and config.problem_type_of(dtype) != "single_label_classification"


def _positions(batch: Mapping[str, Tensor], name: str) -> Tensor:
    return as_index(batch[name], batch[name].device).reshape(-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
