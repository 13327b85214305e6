"""A model and its cache behind the calls that every search makes (`opt_core.stepper`), JAX.

Prompts, capacities and steps of several tokens are filled up to few widths, so that few programs are compiled.
"""

import functools

import jax
import numpy as np
from flax import nnx
from jax import Array

from opt_core.generation import bucketed
from opt_core.stepper import StepOutput, width_of_step
from opt_flax.cache import Cache, reorder, with_capacity
from opt_flax.packing import pool_last_token
from opt_flax.sharding import on_host


class ModelStepper:
    """Steps a causal language model in evaluation mode; one at a time, since the cache is its own."""

    def __init__(self, model):
        self.model, self.cache, self.lengths_R = model, None, np.zeros(0, int)
        self.graphdef, self.state = nnx.split(model)

    def prefill(
        self, input_ids_RT: np.ndarray, real_RT: np.ndarray, capacity: int, *, output_hidden: bool = False
    ) -> StepOutput:
        T = input_ids_RT.shape[1]
        fill = ((0, 0), (0, bucketed(T) - T))
        ids_RT, filled_RT = np.pad(input_ids_RT.astype(np.int32), fill), np.pad(real_RT, fill)
        slots = bucketed(max(capacity, T))
        logits_RV, hidden_RTE, self.cache = _prefill(self.graphdef, self.state, ids_RT, filled_RT, slots)
        self.lengths_R = real_RT.sum(1)
        return _as_numpy(logits_RV, hidden_RTE[:, :T] if output_hidden else None)

    def step(self, tokens_RT: np.ndarray, *, output_hidden: bool = False) -> StepOutput:
        T = tokens_RT.shape[1]
        room = min(self.cache.capacity, self.model.config.max_position_embeddings) - int(self.lengths_R.max())
        ids_RT = np.pad(tokens_RT.astype(np.int32), ((0, 0), (0, width_of_step(T, room) - T)))
        logits_RTV, hidden_RTE, self.cache = _step(self.graphdef, self.state, ids_RT, self.cache)
        self.truncate(self.lengths_R + T)
        return _as_numpy(logits_RTV[:, :T], hidden_RTE[:, :T] if output_hidden else None)

    def reorder(self, rows_Q: np.ndarray) -> None:
        self.cache, self.lengths_R = self.placed(reorder(self.cache, rows_Q)), self.lengths_R[rows_Q]

    def truncate(self, lengths_R: np.ndarray) -> None:
        self.lengths_R = lengths_R
        self.cache = self.placed(self.cache._replace(lengths=jax.numpy.asarray(lengths_R, self.cache.lengths.dtype)))

    def placed(self, cache: Cache) -> Cache:
        """The cache as a compiled step gives it back, so that the next step is the same program."""
        return cache if self.model.placement is None else self.model.placement.put_cache(cache)


def _as_numpy(logits: Array, hidden: Array | None) -> StepOutput:
    logits, hidden = (None if x is None else np.asarray(on_host(x), np.float32) for x in (logits, hidden))
    return StepOutput(logits, hidden)


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _prefill(graphdef, state, ids_RT: Array, real_RT: Array, capacity: int) -> tuple[Array, Array, Cache]:
    model = nnx.merge(graphdef, state)
    out = model.base_model.decoder(ids_RT, real_RT, use_cache=True)
    logits_RV = model.logits(pool_last_token(out.last_hidden_state, real_RT))
    return logits_RV, out.last_hidden_state, with_capacity(out.past_key_values, capacity)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def _step(graphdef, state, ids_RT: Array, cache: Cache) -> tuple[Array, Array, Cache]:
    model = nnx.merge(graphdef, state)
    out = model.base_model.decoder(ids_RT, past_key_values=cache, use_cache=True)
    return model.logits(out.last_hidden_state), out.last_hidden_state, out.past_key_values
