"""Every variant, padding case, attention implementation and dtype of every backend against the float64 reference."""

import numpy as np
import pytest
from harness import (
    BATCH,
    BOUND,
    LENGTH,
    MASKS,
    ROUNDOFF,
    VARIANTS,
    config_of,
    mask_named,
    reference_of,
    token_ids,
    worst_row,
)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_logits_equal_the_reference_under_every_mask(backend, variant, attn_implementation):
    config = config_of(variant)
    model, reference = backend.random_model(config, attn_implementation=attn_implementation), reference_of(config)
    ids = token_ids(config)
    for name in MASKS:
        mask = mask_named(name)
        truth = reference.logits(reference(ids, mask).last_hidden_state)
        got = backend.numpy(model(ids, attention_mask=mask).logits)
        assert worst_row(got, truth) <= BOUND["float32"] * ROUNDOFF["float32"], name


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["pre-norm", "350m style", "galactica style", "untied head"])
def test_half_precision_logits_equal_the_reference_on_the_same_weights(backend, variant, dtype, attn_implementation):
    config = config_of(variant)
    model = backend.random_model(config, dtype=dtype, attn_implementation=attn_implementation)
    reference = reference_of(config, dtype=dtype)
    ids = token_ids(config)
    for name in MASKS:
        mask = mask_named(name)
        truth = reference.logits(reference(ids, mask).last_hidden_state)
        out = model(ids, attention_mask=mask)
        assert backend.dtype_of(out.logits) == dtype
        assert worst_row(backend.numpy(out.logits), truth) <= BOUND[dtype] * ROUNDOFF[dtype], name


@pytest.mark.parametrize("variant", ["pre-norm", "350m style", "no final norm"])
def test_hidden_states_are_the_inputs_of_the_layers_and_then_the_output(backend, variant):
    config = config_of(variant)
    model, reference = backend.random_model(config, "base"), reference_of(config, "base")
    ids, mask = token_ids(config), mask_named("left")
    out, truth = model(ids, attention_mask=mask, output_hidden_states=True), reference(ids, mask)
    assert len(out.hidden_states) == config.num_hidden_layers + 1
    for got, want in zip(out.hidden_states, truth.hidden_states, strict=True):
        assert worst_row(backend.numpy(got), want) <= 64 * ROUNDOFF["float32"]
    assert (backend.numpy(out.hidden_states[-1]) == backend.numpy(out.last_hidden_state)).all()


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", ["none", "left", "holes", "an empty row"])
def test_attentions_equal_the_reference_in_the_columns_of_the_input(backend, mask, attn_implementation):
    config = config_of()
    model = backend.random_model(config, "base", attn_implementation=attn_implementation)
    ids, mask = token_ids(config), mask_named(mask)
    out = model(ids, attention_mask=mask, output_attentions=True)
    truth = reference_of(config, "base")(ids, mask)
    assert len(out.attentions) == config.num_hidden_layers
    for got, want in zip(out.attentions, truth.attentions, strict=True):
        assert got.shape == (BATCH, config.num_attention_heads, LENGTH, LENGTH)
        np.testing.assert_allclose(backend.numpy(got), want, atol=2e-6)


def test_what_was_not_asked_for_is_none(backend):
    out = backend.random_model(config_of())(token_ids(config_of()), use_cache=False)
    assert out.loss is None
    assert out.hidden_states is None
    assert out.attentions is None
    assert out.past_key_values is None


def test_inputs_embeds_equal_the_tokens_that_they_embed(backend):
    config = config_of("350m style")
    model = backend.random_model(config)
    ids, mask = token_ids(config), mask_named("left")
    embeds = backend.numpy(model.weight("decoder.embed_tokens.weight"))[ids].astype(np.float32)
    from_ids = backend.numpy(model(ids, attention_mask=mask).logits)
    for given in (embeds, backend.array(embeds)):
        from_embeds = backend.numpy(model(inputs_embeds=given, attention_mask=mask).logits)
        np.testing.assert_array_equal(from_embeds, from_ids)


@pytest.mark.parametrize("rows", [1, BATCH])
def test_position_ids_are_obeyed(backend, rows):
    config = config_of()
    ids = token_ids(config)
    positions = np.random.default_rng(1).integers(0, config.max_position_embeddings, (rows, LENGTH))
    reference = reference_of(config)
    truth = reference.logits(reference(ids, position_ids=positions).last_hidden_state)
    got = backend.numpy(backend.random_model(config)(ids, position_ids=positions).logits)
    assert worst_row(got, truth) <= 64 * ROUNDOFF["float32"]


def test_position_ids_of_padding_may_be_anything(backend):
    config = config_of()
    model = backend.random_model(config)
    ids, mask = token_ids(config), mask_named("left")
    positions = np.cumsum(mask, axis=1) * mask - 1  # the published recipe: -1 at padding
    got = backend.numpy(model(ids, attention_mask=mask, position_ids=positions).logits)
    np.testing.assert_allclose(got, backend.numpy(model(ids, attention_mask=mask).logits), atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "bool", "float32"])
def test_masks_and_ids_of_any_dtype_mean_the_same(backend, dtype):
    config = config_of()
    model = backend.random_model(config)
    ids, mask = token_ids(config), mask_named("holes")
    want = backend.numpy(model(ids, attention_mask=mask).logits)
    ids_dtype = dtype if dtype not in ("bool", "float32") else "int16"
    got = model(ids.astype(ids_dtype), attention_mask=mask.astype(dtype)).logits
    np.testing.assert_array_equal(backend.numpy(got), want)
    got = model(backend.array(ids.astype("int32")), attention_mask=backend.array(mask.astype(dtype))).logits
    np.testing.assert_array_equal(backend.numpy(got), want)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_what_stands_at_padding_never_matters(backend, attn_implementation):
    model = backend.random_model(config_of(), attn_implementation=attn_implementation)
    embeds = np.random.default_rng(1).normal(size=(BATCH, LENGTH, 35)).astype(np.float32)
    for name in ("left", "right", "holes", "an empty row"):
        mask = mask_named(name)
        got, want = (
            backend.numpy(model(inputs_embeds=np.where(mask[..., None], embeds, x), attention_mask=mask).logits)
            for x in (np.float32(np.nan), np.float32(1))
        )
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_arrays_of_another_byte_order_or_without_write_access_are_taken(backend, recwarn):
    model, ids = backend.random_model(config_of()), token_ids(config_of())
    frozen = ids.copy()
    frozen.setflags(write=False)
    for same in (frozen, ids.astype(">i8")):
        np.testing.assert_array_equal(backend.numpy(model(same).logits), backend.numpy(model(ids).logits))
    assert [str(w.message) for w in recwarn if "not writable" in str(w.message)] == []


def test_a_sequence_of_all_positions_works_and_one_more_is_refused(backend):
    config = config_of()
    model, ids = backend.random_model(config), token_ids(config, 2, config.max_position_embeddings + 1)
    reference = reference_of(config)
    truth = reference.logits(reference(ids[:, :-1]).last_hidden_state)
    assert worst_row(backend.numpy(model(ids[:, :-1]).logits), truth) <= 64 * ROUNDOFF["float32"]
    with pytest.raises(ValueError, match="at most max_position_embeddings = 41 real tokens a row, got 42"):
        model(ids)
    mask = np.ones(ids.shape, int)
    mask[:, 3] = 0  # 41 real tokens in 42 columns
    truth = reference.logits(reference(ids, mask).last_hidden_state)
    assert worst_row(backend.numpy(model(ids, attention_mask=mask).logits), truth) <= 64 * ROUNDOFF["float32"]


@pytest.mark.parametrize("kept", [1, 2, LENGTH, LENGTH + 5])
def test_logits_to_keep_are_the_last_ones(backend, kept):
    config = config_of()
    model, ids, mask = backend.random_model(config), token_ids(config), mask_named("left")
    whole = backend.numpy(model(ids, attention_mask=mask, labels=ids).logits)
    got = model(ids, attention_mask=mask, logits_to_keep=kept)
    np.testing.assert_allclose(backend.numpy(got.logits), whole[:, -kept:], atol=1e-5)
    with_loss = model(ids, attention_mask=mask, labels=ids, logits_to_keep=kept)
    assert with_loss.logits.shape == got.logits.shape
    assert float(with_loss.loss) == float(model(ids, attention_mask=mask, labels=ids).loss)


def test_numbers_of_numpy_are_taken_as_those_of_python(backend):
    model, ids = backend.random_model(config_of()), token_ids(config_of())
    out = model(ids, logits_to_keep=np.int64(2), use_cache=np.bool_(False))
    assert out.logits.shape[1] == 2
    assert out.past_key_values is None


def test_a_batch_equals_its_rows_alone(backend):
    config = config_of()
    model, ids, mask = backend.random_model(config), token_ids(config), mask_named("holes")
    together = backend.numpy(model(ids, attention_mask=mask).logits)
    for row in range(BATCH):
        real = mask[row] == 1
        alone = backend.numpy(model(ids[row : row + 1, real]).logits)[0]
        np.testing.assert_allclose(together[row, real], alone, atol=1e-5)


def test_extreme_scores_do_not_overflow_in_float16(backend):
    """Scores of padding below -16 made the published float16 models return NaN in whole rows."""
    config = config_of()
    model = backend.random_model(config, dtype="float16", attn_implementation="eager")
    ids = token_ids(config)
    for name in ("left", "an empty row"):
        for scale in (1, 4):
            embeds = scale * backend.numpy(model.weight("decoder.embed_tokens.weight"))[ids]
            out = model(inputs_embeds=embeds.astype(np.float16), attention_mask=mask_named(name))
            logits = backend.numpy(out.logits)
            assert np.isfinite(logits).all()
            assert (logits[mask_named(name) == 0] == 0).all()
