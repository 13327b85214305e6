"""Greedy generation, TensorFlow: one prefill, then one step per token on a preallocated cache, all in one XLA function.

XLA compiles one program per batch size, prompt length and capacity, so lengths are rounded up to whole buckets: the
prompt is padded on the right, where nothing looks, and the number of steps is an argument of the program.
"""

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation import GenerationPlan, bucketed, plan_generation
from opt_tf.cache import Cache, with_capacity
from opt_tf.inputs import as_index, as_tensor, known
from opt_tf.packing import pool_last_token


class GenerationMixin:
    """`generate` for a model with a decoder and a head."""

    def generate(self, input_ids=None, attention_mask=None, max_new_tokens: int | None = None, **options) -> Tensor:
        """Continues each row of `input_ids` [B, T] greedily; returns [B, T + n] token ids, prompt and padding included.

        Rows end at an `eos_token_id` and hold `pad_token_id` after it; n is the longest of them. Dropout is off. Takes
        values, so it is not for use inside a `tf.function`.

        Args:
            attention_mask: [B, T], 1 for real tokens; without it tokens equal to `pad_token_id` are padding.
            max_new_tokens: at most that many; 20 if neither it nor `max_length` (which counts the prompt) is given.
            options: `max_length`, `eos_token_id` (one or several), `pad_token_id`.

        Raises:
            InputError: before anything is computed; also when the text would outgrow `max_position_embeddings`.
        """
        plan = plan_generation(
            self.config,
            known(as_index(input_ids)),
            known(as_tensor(attention_mask)),
            max_new_tokens=max_new_tokens,
            **options,
        )
        return tf.concat([tf.constant(plan.input_ids), self._search(plan)], axis=1)

    def _search(self, plan: GenerationPlan) -> Tensor:
        if self.compiled_search is None:
            self.compiled_search = tf.function(self.search, autograph=False, jit_compile=True)
        T = plan.input_ids.shape[1]
        to_bucket = ((0, 0), (0, bucketed(T) - T))
        tokens_BS, count = self.compiled_search(
            tf.constant(np.pad(plan.input_ids, to_bucket, constant_values=plan.pad_token_id)),
            tf.constant(np.pad(plan.real, to_bucket)),
            tf.constant(plan.max_new_tokens),
            tf.constant(plan.eos_token_ids, tf.int64),
            tf.constant(plan.pad_token_id, tf.int64),
            plan.capacity,
        )
        return tokens_BS[:, :count]

    def search(
        self, input_ids_BT: Tensor, real_BT: Tensor, max_new_tokens: Tensor, eos: Tensor, pad: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor]:
        """The new tokens [B, capacity] and their number; the columns after it are padding."""
        B = input_ids_BT.shape[0]

        def choose(logits_BV, tokens_BS, count, ended_B):
            token_B = tf.where(ended_B, pad, tf.argmax(logits_BV, axis=-1))
            index_B2 = tf.stack([tf.range(B), tf.fill([B], count)], axis=1)
            tokens_BS = tf.tensor_scatter_nd_update(tokens_BS, index_B2, token_B)
            return token_B, tokens_BS, count + 1, ended_B | tf.reduce_any(token_B[:, None] == eos, axis=1)

        def step(token_B, tokens_BS, count, ended_B, cache):
            logits_BV, cache = self.decode_step(token_B, cache)
            return *choose(logits_BV, tokens_BS, count, ended_B), cache

        logits_BV, cache = self.prefill(input_ids_BT, real_BT, capacity)
        state = choose(logits_BV, tf.fill([B, capacity], pad), tf.constant(0), tf.zeros([B], tf.bool))
        _, tokens_BS, count, _, _ = tf.while_loop(
            lambda _, __, count, ended_B, ___: (count < max_new_tokens) & ~tf.reduce_all(ended_B),
            step,
            (*state, cache),
            parallel_iterations=1,
        )
        return tokens_BS, count

    def prefill(self, input_ids_BT: Tensor, real_BT: Tensor, capacity: int) -> tuple[Tensor, Cache]:
        """Runs the prompt; returns the logits [B, V] after the last real token of each row, and its cache."""
        out = self.base_model.decoder(input_ids_BT, real_BT, use_cache=True)
        last_BE = pool_last_token(out.last_hidden_state, real_BT)
        return self.logits(last_BE), with_capacity(out.past_key_values, capacity)

    def decode_step(self, token_B: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Feeds one token a row; returns the logits [B, V] after it, and the cache with it."""
        out = self.base_model.decoder(token_B[:, None], past_key_values=cache, use_cache=True)
        return self.logits(out.last_hidden_state[:, 0]), out.past_key_values
