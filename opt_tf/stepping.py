"""A model and its cache behind the calls that every search makes (`opt_core.stepper`), TensorFlow.

Prompts, capacities and steps of several tokens are filled up to few widths, so that few programs are compiled.
"""

import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation import bucketed
from opt_core.stepper import StepOutput, width_of_step
from opt_tf.cache import Cache, reorder, with_capacity
from opt_tf.packing import pool_last_token
from opt_tf.sharding import Placement, compile_for


class ModelStepper:
    """Steps a causal language model in evaluation mode; one at a time, since the cache is its own."""

    def __init__(self, model):
        self.model, self.cache, self.lengths_R = model, None, np.zeros(0, int)
        if model.compiled_steps is None:  # kept with the model: another stepper of it compiles nothing anew
            programs = (functools.partial(program, model) for program in (_prefill, _step))
            model.compiled_steps = _compiled(model.placement, *programs)
        self.compiled_prefill, self.compiled_step, self.reordered = model.compiled_steps

    def prefill(
        self, input_ids_RT: np.ndarray, real_RT: np.ndarray, capacity: int, *, output_hidden: bool = False
    ) -> StepOutput:
        T = input_ids_RT.shape[1]
        fill = ((0, 0), (0, bucketed(T) - T))
        ids_RT, filled_RT = (tf.constant(np.pad(x, fill)) for x in (input_ids_RT, real_RT))
        slots = bucketed(max(capacity, T))
        logits_RV, hidden_RTE, self.cache = self.compiled_prefill(ids_RT, filled_RT, slots)
        self.lengths_R = real_RT.sum(1)
        return _as_numpy(logits_RV, hidden_RTE[:, :T] if output_hidden else None)

    def step(self, tokens_RT: np.ndarray, *, output_hidden: bool = False) -> StepOutput:
        T = tokens_RT.shape[1]
        room = min(self.cache.capacity, self.model.config.max_position_embeddings) - int(self.lengths_R.max())
        ids_RT = tf.constant(np.pad(tokens_RT, ((0, 0), (0, width_of_step(T, room) - T))))
        logits_RTV, hidden_RTE, self.cache = self.compiled_step(ids_RT, self.cache)
        self.truncate(self.lengths_R + T)
        return _as_numpy(logits_RTV[:, :T], hidden_RTE[:, :T] if output_hidden else None)

    def reorder(self, rows_Q: np.ndarray) -> None:
        self.cache, self.lengths_R = self.reordered(self.cache, tf.constant(rows_Q)), self.lengths_R[rows_Q]

    def truncate(self, lengths_R: np.ndarray) -> None:
        self.lengths_R = lengths_R
        self.cache = self.cache._replace(lengths=tf.constant(lengths_R, self.cache.lengths.dtype))


def _compiled(placement: Placement | None, *programs: Callable) -> tuple[Callable, ...]:
    """The programs, and `reorder`, for where the model is."""
    if placement is None:
        return *(tf.function(program, autograph=False, jit_compile=True) for program in programs), reorder
    return tuple(compile_for(placement, program) for program in (*programs, reorder))


def _as_numpy(logits: Tensor, hidden: Tensor | None) -> StepOutput:
    logits, hidden = (None if x is None else tf.cast(x, tf.float32).numpy() for x in (logits, hidden))
    return StepOutput(logits, hidden)


def _prefill(model, ids_RT: Tensor, real_RT: Tensor, capacity: int) -> tuple[Tensor, Tensor, Cache]:
    out = model.base_model.decoder(ids_RT, real_RT, use_cache=True)
    logits_RV = model.logits(pool_last_token(out.last_hidden_state, real_RT))
    return logits_RV, out.last_hidden_state, with_capacity(out.past_key_values, capacity)


def _step(model, ids_RT: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Cache]:
    out = model.base_model.decoder(ids_RT, past_key_values=cache, use_cache=True)
    return model.logits(out.last_hidden_state), out.last_hidden_state, out.past_key_values
