"""Losses of the three tasks, JAX: float32 whatever the model's dtype, and 0 where nothing is counted.

That of a language model is `linear_cross_entropy`; here are its targets.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from opt_core.checks import check_has_loss
from opt_core.config import OPTConfig
from opt_core.reference import IGNORED_LABEL
from opt_flax.inputs import as_index
from opt_flax.layers import at_least_float32

POSITIONS = ("start_positions", "end_positions")


@jax.jit
def causal_lm_targets(labels_BT: Array, attention_mask: Array | None = None, segment_ids: Array | None = None) -> Array:
    """What each token is to predict [B, T]: the label after it, -100 where that is not counted.

    Not counted: labels of -100, predictions at padding, those of another document, and what follows the last token.
    """
    targets_BT = labels_BT[:, 1:]
    if attention_mask is not None:
        targets_BT = jnp.where(attention_mask[:, :-1] != 0, targets_BT, IGNORED_LABEL)
    if segment_ids is not None:
        targets_BT = jnp.where(segment_ids[:, 1:] == segment_ids[:, :-1], targets_BT, IGNORED_LABEL)
    return jnp.pad(targets_BT, ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)


def answer_targets(positions_B: Array, tokens: int, attention_mask: Array | None = None) -> Array:
    """The positions [B] in rows of so many tokens; -100 for one at padding, or beyond the row (a truncated answer)."""
    target_BT = positions_B[:, None] == jnp.arange(tokens)
    if attention_mask is not None:
        target_BT = target_BT & (attention_mask != 0)
    return jnp.where(target_BT.any(1), positions_B, IGNORED_LABEL)


@functools.partial(jax.jit, static_argnames="problem_type")
def classification_loss(logits_BK: Array, labels: Array, problem_type: str) -> Array:
    """Cross entropy, mean squared error, or binary cross entropy with logits, by `problem_type`."""
    if problem_type == "single_label_classification":
        return cross_entropy(logits_BK, labels.reshape(-1))
    logits_BK, labels = _at_least_float32(logits_BK), labels.astype(_at_least_float32(logits_BK).dtype)
    if problem_type == "regression":
        return ((logits_BK.reshape(-1) - labels.reshape(-1)) ** 2).mean()
    return (jax.nn.softplus(logits_BK) - logits_BK * labels).mean()


@jax.jit
def question_answering_loss(
    start_BT: Array,
    end_BT: Array,
    starts_B: Array,
    ends_B: Array,
    attention_mask: Array | None = None,
    shares: Sequence[float | Array] = (1.0, 1.0),
) -> Array:
    """The mean of the losses of start and end, each a softmax over the real positions of its row.

    A position of -100, one at padding, or one beyond the sequence (a truncated answer) is not counted. Each of the two
    losses, which are means themselves, is multiplied with its share before.
    """
    losses = []
    for logits_BT, positions_B in ((start_BT, starts_B), (end_BT, ends_B)):
        logits_BT = _at_least_float32(logits_BT)
        if attention_mask is not None:
            logits_BT = jnp.where(attention_mask != 0, logits_BT, jnp.finfo(logits_BT.dtype).min)
        losses.append(cross_entropy(logits_BT, answer_targets(positions_B, logits_BT.shape[1], attention_mask)))
    return (losses[0] * shares[0] + losses[1] * shares[1]) / 2


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean of -log softmax(logits)[label] over the labels that are not -100; 0 where all are.

    NaN where a label is out of range, which a compiled function cannot refuse.
    """
    logits, counted = _at_least_float32(logits), labels != IGNORED_LABEL
    columns = jnp.where(counted, jnp.where(labels < 0, logits.shape[-1], labels), 0)
    chosen = jnp.take_along_axis(logits, columns[..., None], -1, mode="fill")[..., 0]
    losses = jax.nn.logsumexp(logits, -1) - chosen
    return jnp.where(counted, losses, 0).sum() / jnp.maximum(counted.sum(), 1)


# -- parts of a batch -------------------------------------------------------------------------------------------------


def counted_targets(batch: Mapping[str, Array], task: str, config: OPTConfig) -> list[Array | int]:
    """How many targets count of each mean that a loss is made of: of one, or of starts and of ends."""
    mask_BT, labels = batch.get("attention_mask"), batch.get("labels")
    if batch.keys() >= set(POSITIONS):
        tokens = (batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]).shape[1]
        targets = [answer_targets(_positions(batch, name), tokens, mask_BT) for name in POSITIONS]
    elif labels is None or _are_all_counted(labels, task, config):
        return [len(next(iter(batch.values())))]
    elif task == "causal-lm":
        targets = [causal_lm_targets(as_index(labels), mask_BT, batch.get("segment_ids"))]
    else:
        targets = [as_index(labels)]
    return [(x != IGNORED_LABEL).sum() for x in targets]


def part_of_loss(out, part: Mapping[str, Array], shares: Sequence[float | Array]) -> Array:
    """What a part adds to the loss of the whole batch, by its outputs and its shares of `counted_targets`.

    Raises:
        InputError: there were no labels.
    """
    check_has_loss(out)
    if len(shares) == 1:
        return out.loss * shares[0]
    positions = (_positions(part, name) for name in POSITIONS)
    return question_answering_loss(out.start_logits, out.end_logits, *positions, part.get("attention_mask"), shares)


def _are_all_counted(labels: Array, task: str, config: OPTConfig) -> bool:
    dtype = str(labels.dtype)
    return task == "sequence-classification" and config.problem_type_of(dtype) != "single_label_classification"


def _positions(batch: Mapping[str, Array], name: str) -> Array:
    return as_index(batch[name]).reshape(-1)


def _at_least_float32(x: Array) -> Array:
    return x.astype(at_least_float32(x.dtype))
