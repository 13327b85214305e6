"""Generation, JAX: one prefill, then one step per token on a preallocated cache.

Both are compiled, once per batch size and bucket of lengths: prompts are filled up with padding on the right, and the
number of new tokens is a bound that the loop reads. The loop ends early when every row has ended.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from opt_core.generation import GenerationPlan, bucketed
from opt_core.generation_config import GenerationConfig
from opt_core.generation_output import GenerateOutput, as_arrays
from opt_core.generation_request import GenerationRequest, call_options, plan_request
from opt_core.searching import search, stream
from opt_flax.cache import Cache, as_bits, from_bits, with_capacity
from opt_flax.inputs import known
from opt_flax.packing import pool_last_token
from opt_flax.processes import agreed_request
from opt_flax.sharding import on_host
from opt_flax.stepping import ModelStepper


class _Aside:
    """A value that programs do not depend on: equal to any other, so that changing it compiles nothing anew."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other) -> bool:
        return isinstance(other, _Aside)

    def __hash__(self) -> int:
        return hash(_Aside)


class GenerationMixin:
    """`generate` for a model with a decoder and a head."""

    @property
    def generation_config(self) -> GenerationConfig:
        """That of the checkpoint, or what it was set to."""
        return self.options.value

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.options = _Aside(value)

    def generate(
        self,
        input_ids=None,
        attention_mask=None,
        max_new_tokens: int | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        assistant_model: "GenerationMixin | None" = None,
        **options,
    ) -> Array | GenerateOutput:
        """Continues each row of `input_ids` [B, T]; returns [R, T + n] token ids, prompt and padding included.

        Greedy unless options say otherwise, which `opt_core.generation_config.GenerationConfig` lists: sampling, beams,
        contrastive and assisted search, rules for logits, ways to stop. R is B times `num_return_sequences`. Rows end
        at an `eos_token_id` and hold `pad_token_id` after it; n is the longest of them. Dropout is off.

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
        with _evaluating(models):
            if request.is_plain:
                return jnp.asarray(
                    np.concatenate([request.plan.input_ids, self._search(request.plan)], axis=1), jnp.int32
                )
            out = search(request, *map(ModelStepper, models))
        out = as_arrays(out, lambda x: jnp.asarray(x, jnp.int32 if x.dtype == np.int64 else x.dtype))
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
        with _evaluating(models):
            tokens = stream(request, *map(ModelStepper, models))
        return _streamed(tokens, models)

    def _request(
        self, input_ids, attention_mask, generation_config, assistant_model, max_new_tokens, options
    ) -> GenerationRequest:
        def plan() -> GenerationRequest:
            return plan_request(
                self.config,
                known(input_ids),
                known(attention_mask),
                generation_config or self.generation_config,
                **call_options(options, max_new_tokens, assistant_model, GenerationMixin),
            )

        is_seeded = options.get("seed") is not None or options.get("generator") is not None
        return agreed_request(self.placement, plan, is_seeded=is_seeded)

    def _search(self, plan: GenerationPlan) -> np.ndarray:
        graphdef, state = nnx.split(self)
        fill = ((0, 0), (0, bucketed(plan.input_ids.shape[1]) - plan.input_ids.shape[1]))
        ids_BT, real_BT = np.pad(plan.input_ids.astype(np.int32), fill), np.pad(plan.real, fill)
        logits_BV, cache = _prefill(graphdef, state, ids_BT, real_BT, plan.capacity)
        eos = np.array(plan.eos_token_ids, np.int32)
        tokens_BS, count, _ = _decode(graphdef, state, logits_BV, cache, eos, plan.pad_token_id, plan.max_new_tokens)
        return on_host(tokens_BS)[:, : int(on_host(count))]

    def prefill(self, input_ids_BT: Array, real_BT: Array, capacity: int) -> tuple[Array, Cache]:
        """Runs the prompt; returns the logits [B, V] after the last real token of each row, and its cache."""
        out = self.base_model.decoder(input_ids_BT, real_BT, use_cache=True)
        last_BE = pool_last_token(out.last_hidden_state, real_BT)
        return self.logits(last_BE), with_capacity(out.past_key_values, capacity)

    def decode_step(self, token_B: Array, cache: Cache) -> tuple[Array, Cache]:
        """Feeds one token a row; returns the logits [B, V] after it, and the cache with it."""
        out = self.base_model.decoder(token_B[:, None], past_key_values=cache, use_cache=True)
        return self.logits(out.last_hidden_state[:, 0]), out.past_key_values


def _streamed(tokens: Iterator[np.ndarray], models: list) -> Iterator[np.ndarray]:
    with _evaluating(models):
        yield from tokens


@contextlib.contextmanager
def _evaluating(models: list) -> Iterator[None]:
    """Without dropout; models that were in training mode are in it again afterwards."""
    in_training = [model for model in models if model.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model in in_training:
            model.train()


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
