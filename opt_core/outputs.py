"""What a model returns: named tuples, so that they pass through jit, `tf.function` and `torch.compile` as they are.

Fields that were not asked for are None. Arrays are those of the framework in use.
"""

from typing import Any, NamedTuple

Array = Any  # an array of PyTorch, TensorFlow or JAX


class BaseModelOutput(NamedTuple):
    """`last_hidden_state` [B, T, E]: after the final norm and `project_out`; zero in padding rows.

    `hidden_states`: L + 1 arrays. Entry i is the input of layer i [B, T, D], the last one is `last_hidden_state`.
    `attentions`: L arrays [B, N, T, S] of softmax weights, before dropout.
    """

    last_hidden_state: Array
    past_key_values: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


class CausalLMOutput(NamedTuple):
    """`loss` float32 scalar, `logits` [B, T, V] (or of the last `logits_to_keep`); else as `BaseModelOutput`."""

    loss: Array
    logits: Array
    past_key_values: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


class SequenceClassifierOutput(NamedTuple):
    """`loss` float32 scalar, `logits` [B, K] of the last real token of each row."""

    loss: Array
    logits: Array
    past_key_values: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


class QuestionAnsweringOutput(NamedTuple):
    """`loss` float32 scalar, `start_logits` and `end_logits` [B, T], zero in padding rows."""

    loss: Array
    start_logits: Array
    end_logits: Array
    past_key_values: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
