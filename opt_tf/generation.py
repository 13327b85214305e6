"""Generation, TensorFlow: greedy search as one XLA function, a prefill and one step per token on a preallocated cache.

XLA compiles one program per batch size, prompt length and capacity, so lengths are rounded up to whole buckets: the
prompt is padded on the right, where nothing looks, and the number of steps is an argument of the program.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation import GenerationPlan, bucketed
from opt_core.generation_config import GenerationConfig
from opt_core.generation_output import GenerateOutput, as_arrays
from opt_core.generation_request import GenerationRequest, call_options, plan_request
from opt_core.searching import search, stream
from opt_tf.cache import Cache, with_capacity
from opt_tf.inputs import as_index, as_tensor, known
from opt_tf.packing import pool_last_token
from opt_tf.stepping import ModelStepper


class GenerationMixin:
    """`generate` for a model with a decoder and a head."""

    generation_config: GenerationConfig  # that of the checkpoint, or what it was set to

    def generate(
        self,
        input_ids=None,
        attention_mask=None,
        max_new_tokens: int | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        assistant_model: "GenerationMixin | None" = None,
        **options,
    ) -> Tensor | GenerateOutput:
        """Continues each row of `input_ids` [B, T]; returns [R, T + n] token ids, prompt and padding included.

        Greedy unless options say otherwise, which `opt_core.generation_config.GenerationConfig` lists: sampling, beams,
        contrastive and assisted search, rules for logits, ways to stop. R is B times `num_return_sequences`. Rows end
        at an `eos_token_id` and hold `pad_token_id` after it; n is the longest of them. Dropout is off. Takes
        values, so it is not for use inside a `tf.function`.

        Args:
            attention_mask: [B, T], 1 for real tokens; without it tokens equal to `pad_token_id` are padding.
            max_new_tokens: at most that many; 20 if neither it nor `max_length` (which counts the prompt) is given.
            generation_config: instead of the model's own, which came with its checkpoint; options override it.
            assistant_model: a smaller model of the same vocabulary, which drafts tokens for this one to verify.
            options: also `seed` (the same text in every framework) or `generator` (NumPy's), `logits_processor`,
                `stopping_criteria`, `prefix_allowed_tokens_fn`, `tokenizer` for stop strings, `streamer`.

        Returns:
            With `return_dict_in_generate` an `opt_core.generation_output.GenerateOutput`.

        Raises:
            InputError: before anything is computed; also when the text would outgrow `max_position_embeddings`.
        """
        request = self._request(input_ids, attention_mask, generation_config, assistant_model, max_new_tokens, options)
        models = [model for model in (self, assistant_model) if model is not None]
        if request.is_plain and self.placement is None:
            return tf.concat([tf.constant(request.plan.input_ids), self._search(request.plan)], axis=1)
        out = as_arrays(search(request, *map(ModelStepper, models)), tf.constant)
        return out if request.settings.return_dict_in_generate else out.sequences

    def stream(
        self,
        input_ids=None,
        attention_mask=None,
        max_new_tokens: int | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        assistant_model: "GenerationMixin | None" = None,
        **options,
    ) -> Iterator[np.ndarray]:
        """The new tokens [R] int64 of each step of `generate`, as soon as they are known; arguments are as there.

        `opt_core.streaming.words` makes text of them. Rows that have ended give `pad_token_id`.

        Raises:
            InputError: at once, as `generate`; also for beam search, which does not know its text before the end.
        """
        request = self._request(input_ids, attention_mask, generation_config, assistant_model, max_new_tokens, options)
        models = [model for model in (self, assistant_model) if model is not None]
        return stream(request, *map(ModelStepper, models))

    def _request(
        self, input_ids, attention_mask, generation_config, assistant_model, max_new_tokens, options
    ) -> GenerationRequest:
        return plan_request(
            self.config,
            known(as_index(input_ids)),
            known(as_tensor(attention_mask)),
            generation_config or self.generation_config,
            **call_options(options, max_new_tokens, assistant_model, GenerationMixin),
        )

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
