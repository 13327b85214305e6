"""Greedy generation, JAX: one prefill, then one step per token on a preallocated cache.

Both are compiled, once per batch size and bucket of lengths: prompts are filled up with padding on the right, and the
number of new tokens is a bound that the loop reads. The loop ends early when every row has ended.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from opt_core.generation import GenerationPlan, bucketed, plan_generation
from opt_flax.cache import Cache, as_bits, from_bits, with_capacity
from opt_flax.inputs import known
from opt_flax.packing import pool_last_token


class GenerationMixin:
    """`generate` for a model with a decoder and a head."""

    def generate(self, input_ids=None, attention_mask=None, max_new_tokens: int | None = None, **options) -> Array:
        """Continues each row of `input_ids` [B, T] greedily; returns [B, T + n] token ids, prompt and padding included.

        Rows end at an `eos_token_id` and hold `pad_token_id` after it; n is the longest of them. Dropout is off.

        Args:
            attention_mask: [B, T], 1 for real tokens; without it tokens equal to `pad_token_id` are padding.
            max_new_tokens: at most that many; 20 if neither it nor `max_length` (which counts the prompt) is given.
            options: `max_length`, `eos_token_id` (one or several), `pad_token_id`.

        Raises:
            InputError: before anything is computed; also when the text would outgrow `max_position_embeddings`.
        """
        plan = plan_generation(
            self.config,
            known(input_ids),
            known(attention_mask),
            max_new_tokens=max_new_tokens,
            **options,
        )
        was_training = self.training
        self.eval()
        try:
            new_Bn = self._search(plan)
        finally:
            if was_training:
                self.train()
        return jnp.asarray(np.concatenate([plan.input_ids, new_Bn], axis=1), jnp.int32)

    def _search(self, plan: GenerationPlan) -> np.ndarray:
        graphdef, state = nnx.split(self)
        fill = ((0, 0), (0, bucketed(plan.input_ids.shape[1]) - plan.input_ids.shape[1]))
        ids_BT, real_BT = np.pad(plan.input_ids.astype(np.int32), fill), np.pad(plan.real, fill)
        logits_BV, cache = _prefill(graphdef, state, ids_BT, real_BT, plan.capacity)
        eos = np.array(plan.eos_token_ids, np.int32)
        tokens_BS, count, _ = _decode(graphdef, state, logits_BV, cache, eos, plan.pad_token_id, plan.max_new_tokens)
        return np.asarray(tokens_BS)[:, : int(count)]

    def prefill(self, input_ids_BT: Array, real_BT: Array, capacity: int) -> tuple[Array, Cache]:
        """Runs the prompt; returns the logits [B, V] after the last real token of each row, and its cache."""
        out = self.base_model.decoder(input_ids_BT, real_BT, use_cache=True)
        last_BE = pool_last_token(out.last_hidden_state, real_BT)
        return self.logits(last_BE), with_capacity(out.past_key_values, capacity)

    def decode_step(self, token_B: Array, cache: Cache) -> tuple[Array, Cache]:
        """Feeds one token a row; returns the logits [B, V] after it, and the cache with it."""
        out = self.base_model.decoder(token_B[:, None], past_key_values=cache, use_cache=True)
        return self.logits(out.last_hidden_state[:, 0]), out.past_key_values


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _prefill(graphdef, state, input_ids_BT: Array, real_BT: Array, capacity: int) -> tuple[Array, Cache]:
    return nnx.merge(graphdef, state).prefill(input_ids_BT, real_BT, capacity)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def _decode(
    graphdef, state, logits_BV: Array, cache: Cache, eos: Array, pad_token_id: Array, max_new_tokens: Array
) -> tuple[Array, Array, Cache]:
    """The new tokens [B, capacity], how many columns of them were made, and the cache, which was written in place."""
    model = nnx.merge(graphdef, state)

    def choose(logits_BV: Array, ended_B: Array) -> tuple[Array, Array]:
        token_B = jnp.where(ended_B, pad_token_id, logits_BV.argmax(-1)).astype(jnp.int32)
        return token_B, ended_B | jnp.isin(token_B, eos)

    def goes_on(carry) -> Array:
        _, count, _, ended_B, _ = carry
        return (count < max_new_tokens) & ~ended_B.all()

    def step(carry):
        tokens_BS, count, token_B, ended_B, bits = carry
        logits_BV, cache = model.decode_step(token_B, jax.tree.map(from_bits, bits, dtypes))
        token_B, ended_B = choose(logits_BV, ended_B)
        return tokens_BS.at[:, count].set(token_B), count + 1, token_B, ended_B, jax.tree.map(as_bits, cache)

    token_B, ended_B = choose(logits_BV, jnp.zeros(len(logits_BV), bool))
    tokens_BS = jnp.zeros((len(token_B), cache.capacity), jnp.int32).at[:, 0].set(token_B)
    dtypes, bits = jax.tree.map(lambda x: x.dtype, cache), jax.tree.map(as_bits, cache)  # so no step makes bits of it
    tokens_BS, count, _, _, bits = lax.while_loop(goes_on, step, (tokens_BS, 1, token_B, ended_B, bits))
    return tokens_BS, count, jax.tree.map(from_bits, bits, dtypes)
