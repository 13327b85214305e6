"""Graphs and XLA: dynamic sizes, caches as arguments, what a traced function can check; compiled generation."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf
from harness import BATCH, LENGTH, config_of, mask_named, token_ids

from opt_core.errors import InputError
from opt_core.generation import BUCKET
from opt_tf import Cache, TFOPTForCausalLM
from opt_tf.blockwise import BLOCK
from opt_tf.cache import GrowingCache

IDS = tf.TensorSpec([None, None], tf.int64)
MASK = tf.TensorSpec([None, None], tf.int32)


def a_model(variant: str = "pre-norm", **changes) -> TFOPTForCausalLM:
    tf.random.set_seed(0)
    return TFOPTForCausalLM(config_of(variant, init_std=0.3, **changes))


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("mask", [pytest.param("left", marks=pytest.mark.slow), "holes", "an empty row"])
def test_one_traced_function_serves_every_batch_and_length(mask, jit_compile):
    model = a_model("350m style")
    traced = tf.function(
        lambda ids, mask: model(ids, mask, labels=ids, output_hidden_states=True),
        input_signature=[IDS, MASK],
        jit_compile=jit_compile,
    )
    for batch, length in ((BATCH, LENGTH), (2, 7)):
        ids, mask_BT = token_ids(model.config)[:batch, :length], mask_named(mask)[:batch, :length]
        got = traced(tf.constant(ids), tf.constant(mask_BT, tf.int32))
        want = model(ids, mask_BT, labels=ids, output_hidden_states=True)
        np.testing.assert_allclose(got.logits, want.logits, atol=2e-4)
        np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
        np.testing.assert_allclose(got.hidden_states[1], want.hidden_states[1], atol=2e-5)
    assert traced.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_a_long_padded_batch_trains_the_same_blockwise_and_step_by_step(jit_compile):
    T = BLOCK + 37
    sdpa, eager = (a_model(num_hidden_layers=1, max_position_embeddings=T) for _ in range(2))
    eager.set_attn_implementation("eager")
    ids = token_ids(sdpa.config, 2, T)
    mask = (np.random.default_rng(0).random((2, T)) < 0.9).astype(int)
    gradients = []
    for model in (sdpa, eager):
        variables = [w.value for w in model.trainable_weights]

        def loss_gradients(ids, mask, model=model, variables=variables):
            with tf.GradientTape() as tape:
                loss = model(ids, mask, labels=ids, training=True).loss
            return [tf.convert_to_tensor(g) for g in tape.gradient(loss, variables)]

        traced = tf.function(loss_gradients, jit_compile=jit_compile and model is sdpa)
        gradients.append(traced(tf.constant(ids), tf.constant(mask)))
    for got, want, weight in zip(*gradients, sdpa.trainable_weights, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5, err_msg=weight.path)


@pytest.mark.parametrize("kind", [Cache, GrowingCache])
def test_a_cache_passes_through_a_traced_function_and_keeps_its_kind(kind):
    model, ids = a_model(), token_ids(config_of())
    empty = model.init_cache(BATCH, LENGTH) if kind is Cache else None
    first = model(ids[:, :5], past_key_values=empty, use_cache=True)
    assert type(first.past_key_values) is kind
    step = tf.function(lambda ids, cache: model(ids, past_key_values=cache, use_cache=True))
    got = step(tf.constant(ids[:, 5:]), first.past_key_values)
    assert type(got.past_key_values) is kind
    np.testing.assert_allclose(got.logits, model(ids).logits[:, 5:], atol=2e-4)


def test_a_call_leaves_the_cache_it_was_given_as_it_is():
    model, ids = a_model(), token_ids(config_of())
    cache = model(ids[:, :5], past_key_values=model.init_cache(BATCH, LENGTH), use_cache=True).past_key_values
    before = [x.numpy() for x in tf.nest.flatten(cache)]
    model(ids[:, 5:], past_key_values=cache, use_cache=True)
    for got, want in zip(tf.nest.flatten(cache), before, strict=True):
        np.testing.assert_array_equal(got, want)


def test_an_id_or_a_position_out_of_range_is_nan_under_xla_and_an_error_in_a_graph():
    model = a_model()
    call = lambda ids, positions: model(ids, position_ids=positions).logits  # noqa: E731
    compiled, graph = tf.function(call, jit_compile=True), tf.function(call)
    ids, positions = token_ids(model.config), np.arange(LENGTH)[None]
    for wrong in (97, -1, 1 << 40):
        bad_ids, bad_positions = ids.copy(), positions.copy()
        bad_ids[1, 4] = bad_positions[0, 4] = wrong
        logits = compiled(tf.constant(bad_ids), tf.constant(positions)).numpy()
        assert np.isnan(logits[1, 4]).all()
        assert np.isfinite(logits[0]).all()
        assert np.isnan(compiled(tf.constant(ids), tf.constant(bad_positions))[:, 4]).all()
        for arguments in ((bad_ids, positions), (ids, bad_positions)):
            with pytest.raises(tf.errors.InvalidArgumentError):
                graph(*map(tf.constant, arguments))


def test_a_padded_sequence_with_too_many_real_tokens_is_nan_under_xla():
    model = a_model()
    T = model.config.max_position_embeddings + 3
    ids, mask = token_ids(model.config, 2, T), np.ones((2, T), int)
    mask[0, :5] = 0
    logits = tf.function(lambda *a: model(*a).logits, jit_compile=True)(tf.constant(ids), tf.constant(mask)).numpy()
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1, -1]).all()
    with pytest.raises(InputError, match="max_position_embeddings"):
        model.check_inputs(ids, mask)


def test_shapes_are_checked_while_tracing():
    model = a_model()
    with pytest.raises(Exception, match="attention_mask: expected shape"):
        tf.function(lambda ids: model(ids, attention_mask=tf.ones([BATCH, 3])))(tf.constant(token_ids(model.config)))


# -- generation -------------------------------------------------------------------------------------------------------


def greedy(model, ids, mask, steps: int) -> np.ndarray:
    for _ in range(steps):
        token_B1 = model(ids, mask).logits.numpy()[:, -1:].argmax(-1)
        ids, mask = np.concatenate([ids, token_B1], 1), np.concatenate([mask, np.ones_like(token_B1)], 1)
    return ids


def test_generation_compiles_once_for_all_lengths_of_a_bucket_and_equals_full_passes():
    model, ids, mask = a_model("350m style"), token_ids(config_of()), mask_named("left")
    for length, steps in ((LENGTH, 5), (7, 9), (LENGTH, 1)):
        ids_BT, mask_BT = ids[:, -length:], mask[:, -length:]
        got = model.generate(ids_BT, mask_BT, max_new_tokens=steps, eos_token_id=[0])
        np.testing.assert_array_equal(got, greedy(model, ids_BT, mask_BT, steps))
    assert model.compiled_search.experimental_get_tracing_count() == 1


def test_a_longer_prompt_than_a_bucket_compiles_a_second_program():
    model = a_model(max_position_embeddings=2 * BUCKET + 3)
    for length in (7, BUCKET + 1):
        ids = token_ids(model.config, 2, length)
        got = model.generate(ids, max_new_tokens=3, eos_token_id=[0])
        np.testing.assert_array_equal(got, greedy(model, ids, np.ones_like(ids), 3))
    assert model.compiled_search.experimental_get_tracing_count() == 2


def test_a_prompt_as_long_as_the_position_table_generates_one_token():
    model = a_model()
    ids = token_ids(model.config, 2, model.config.max_position_embeddings)
    got = model.generate(ids)
    np.testing.assert_array_equal(got, greedy(model, ids, np.ones_like(ids), 1))


def test_generation_follows_the_weights_and_the_attention_implementation():
    model, ids = a_model(), token_ids(config_of())
    first = model.generate(ids, max_new_tokens=3, eos_token_id=[0])
    model.set_attn_implementation("eager")
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=3, eos_token_id=[0]), first)
    weight = model.get_input_embeddings().weight
    weight.assign(weight[::-1])
    got = model.generate(ids, max_new_tokens=3, eos_token_id=[0])
    np.testing.assert_array_equal(got, greedy(model, ids, np.ones_like(ids), 3))
    assert (got.numpy() != first.numpy()).any()


def test_a_model_that_has_generated_can_be_freed():
    model = a_model(num_hidden_layers=1)
    model.generate(token_ids(model.config), max_new_tokens=2)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
