"""Laws of cached decoding: a cache changes the speed and nothing else."""

import numpy as np
import pytest
from harness import BATCH, LENGTH, MASKS, ROUNDOFF, VARIANTS, config_of, mask_named, token_ids, worst_row

CHUNKS = {"one by one": [1] * LENGTH, "prefill and steps": [7] + [1] * 6, "chunks": [4, 4, 5], "at once": [LENGTH]}


def run_in_chunks(backend, model, ids, mask, sizes, cache, full_mask):
    """The logits of all calls, concatenated. `full_mask`: pass all columns so far, or only the new ones."""
    logits, start = [], 0
    for size in sizes:
        stop = start + size
        columns = None if mask is None else mask[:, (0 if full_mask else start) : stop]
        out = model(ids[:, start:stop], attention_mask=columns, past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, stop
        logits.append(backend.numpy(out.logits))
    return np.concatenate(logits, axis=1), cache


@pytest.mark.parametrize("full_mask", [True, False], ids=["mask of all columns", "mask of new columns"])
@pytest.mark.parametrize("preallocated", [True, False])
@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_cached_calls_equal_the_full_pass_under_every_mask(backend, sizes, preallocated, full_mask):
    config = config_of()
    model, ids = backend.random_model(config), token_ids(config)
    for name in MASKS:
        mask = mask_named(name)
        whole = backend.numpy(model(ids, attention_mask=mask).logits)
        cache = model.init_cache(BATCH, LENGTH + 2) if preallocated else None
        got, cache = run_in_chunks(backend, model, ids, mask, sizes, cache, full_mask)
        np.testing.assert_allclose(got, whole, atol=2e-5, err_msg=name)
        lengths = [LENGTH] * BATCH if mask is None else mask.sum(1).tolist()
        assert backend.numpy(cache.lengths).tolist() == lengths


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["350m style", "no biases", "no layers", "one head"])
def test_a_cached_step_equals_the_full_pass_in_every_variant(backend, variant, attn_implementation):
    config = config_of(variant)
    model = backend.random_model(config, attn_implementation=attn_implementation)
    ids, mask = token_ids(config), mask_named("left")
    whole = backend.numpy(model(ids, attention_mask=mask).logits)
    got, _ = run_in_chunks(backend, model, ids, mask, [7, 1, 5], None, True)
    np.testing.assert_allclose(got, whole, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cached_step_is_as_exact_as_the_full_pass_in_half_precision(backend, dtype):
    from harness import BOUND, ROUNDOFF, reference_of, worst_row

    config = config_of()
    model, ids, mask = backend.random_model(config, dtype=dtype), token_ids(config), mask_named("left")
    got, _ = run_in_chunks(backend, model, ids, mask, [5, 1, 1, 6], model.init_cache(BATCH, LENGTH), True)
    reference = reference_of(config, dtype=dtype)
    truth = reference.logits(reference(ids, mask).last_hidden_state)
    assert worst_row(got, truth) <= BOUND[dtype] * ROUNDOFF[dtype]


def test_attentions_of_a_cached_step_cover_the_slots_of_the_cache(backend):
    config = config_of()
    model, ids = backend.random_model(config), token_ids(config)
    whole = model(ids, output_attentions=True).attentions
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    step = model(ids[:, -1:], past_key_values=cache, output_attentions=True)
    for got, want in zip(step.attentions, whole, strict=True):
        np.testing.assert_allclose(backend.numpy(got), backend.numpy(want)[:, :, -1:], atol=2e-6)


def test_a_cache_can_be_continued_twice(backend):
    config = config_of()
    model, ids = backend.random_model(config), token_ids(config)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    first, second = (model(ids[:, 6:], past_key_values=cache).logits for _ in range(2))
    np.testing.assert_array_equal(backend.numpy(first), backend.numpy(second))


def test_the_config_decides_whether_a_cache_is_returned(backend):
    ids = token_ids(config_of())
    assert backend.random_model(config_of())(ids).past_key_values is not None
    assert backend.random_model(config_of(use_cache=False))(ids).past_key_values is None


def test_a_full_cache_is_refused_before_anything_is_written(backend):
    config = config_of()
    model, ids = backend.random_model(config), token_ids(config)
    cache = model(ids[:, :5], past_key_values=model.init_cache(BATCH, 7), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: its capacity is 7 tokens a row, this call needs 8"):
        model(ids[:, 5:8], past_key_values=cache)
    got = backend.numpy(model(ids[:, 5:7], past_key_values=cache).logits)
    np.testing.assert_allclose(got, backend.numpy(model(ids[:, :7]).logits)[:, 5:], atol=1e-5)


def test_a_cache_of_other_rows_is_refused(backend):
    model, ids = backend.random_model(config_of()), token_ids(config_of())
    with pytest.raises(ValueError, match="past_key_values: expected a cache of 4 rows, got 2"):
        model(ids, past_key_values=model.init_cache(2, 20))


def test_a_cache_of_another_model_is_refused_before_anything_is_written(backend):
    model, ids = backend.random_model(config_of()), token_ids(config_of())
    problems = {
        "past_key_values: expected a cache of 3 layers, got 2": dict(num_hidden_layers=2),
        "past_key_values: expected a cache of 5 heads of size 7, got 1 of size 35": dict(num_attention_heads=1),
    }
    for problem, changes in problems.items():
        cache = backend.random_model(config_of(**changes)).init_cache(BATCH, 20)
        with pytest.raises(ValueError, match=problem):
            model(ids, past_key_values=cache)
        assert all((backend.numpy(buffer) == 0).all() for buffer in cache.keys)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_a_cache_may_be_wider_than_the_model(backend, attn_implementation):
    config = config_of()
    model = backend.random_model(config, dtype="bfloat16", attn_implementation=attn_implementation)
    ids = token_ids(config)
    wide = backend.random_model(config).init_cache(BATCH, LENGTH)
    got, cache = run_in_chunks(backend, model, ids, None, [7, 6], wide, False)
    assert backend.dtype_of(cache.keys[0]) == "float32"
    assert worst_row(got, backend.numpy(model(ids).logits)) < 16 * ROUNDOFF["bfloat16"]


@pytest.mark.parametrize("cache", [((1, 2),), {}, "cache"])
def test_what_is_no_cache_is_refused(backend, cache):
    problem = f"past_key_values: expected what an earlier call or init_cache returned, got {type(cache).__name__}"
    with pytest.raises(ValueError, match=problem):
        backend.random_model(config_of())(token_ids(config_of()), past_key_values=cache)


def test_a_mask_that_contradicts_the_cache_is_refused(backend):
    model, ids = backend.random_model(config_of()), token_ids(config_of(), 1, 6)
    cache = model(ids[:, :4], attention_mask=[[0, 1, 1, 1]], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"hold \[4\] real tokens, the cache holds \[3\]"):
        model(ids[:, 4:], attention_mask=np.ones((1, 6), int), past_key_values=cache)


def test_positions_beyond_the_table_are_refused_with_a_cache(backend):
    config = config_of()
    model, ids = backend.random_model(config), token_ids(config, 1, config.max_position_embeddings)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="real tokens a row, got 42"):
        model(ids[:, :1], past_key_values=cache)


def test_every_variant_has_a_cache_of_its_layers_and_heads(backend):
    for variant in VARIANTS:
        config = config_of(variant)
        cache = backend.random_model(config).init_cache(2, 11)
        assert len(cache.keys) == len(cache.values) == config.num_hidden_layers
        for buffer in (*cache.keys, *cache.values):
            assert buffer.shape == (2, config.num_attention_heads, 11, config.head_size)
            assert (backend.numpy(buffer) == 0).all()
