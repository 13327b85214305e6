"""Logits, hidden states and attentions against the published PyTorch classes, at real tokens.

Rows of padding are left out: that version spreads the attention of a padding token over all tokens, later ones included
(finfo.min everywhere is a uniform softmax). Here they are zero.
"""

import numpy as np
import pytest
from harness import BOUND, MASKS, ROUNDOFF, VARIANTS, config_of, mask_named, reference_of, token_ids, worst_row
from published_models import our_model, published_logits, published_model, real_rows, torch

FLOAT32_BOUND = BOUND["float32"] * ROUNDOFF["float32"]


@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_is_the_published_model_in_float64(variant, mask_name):
    config = config_of(variant)
    reference, ids = reference_of(config), token_ids(config)
    real = real_rows(mask_name, ids.shape)
    logits = reference.logits(reference(ids, mask_named(mask_name)).last_hidden_state)
    assert worst_row(logits[real], published_logits(variant, mask_name)[real]) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_published_model_under_every_mask(backend, variant):
    model, ids = our_model(backend, variant), token_ids(config_of(variant))
    errors = {}
    for mask_name in MASKS:
        real = real_rows(mask_name, ids.shape)
        logits = backend.numpy(model(ids, mask_named(mask_name)).logits)
        errors[mask_name] = worst_row(logits[real], published_logits(variant, mask_name)[real])
    assert max(errors.values()) <= FLOAT32_BOUND, errors


@pytest.mark.parametrize("variant", ["pre-norm", "350m style", "no layers"])
def test_hidden_states_mean_what_the_published_ones_mean(backend, variant):
    """Entry i is the input of layer i; the last entry comes after the final norm and the projection."""
    config, mask = config_of(variant), mask_named("left")
    ids, real = token_ids(config), mask.astype(bool)
    with torch.no_grad():
        published = published_model(config, "base")(
            torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True
        )
    ours = our_model(backend, variant, "base")(ids, mask, output_hidden_states=True)
    assert len(ours.hidden_states) == len(published.hidden_states) == config.num_hidden_layers + 1
    for mine, theirs in zip(ours.hidden_states, published.hidden_states, strict=True):
        assert worst_row(backend.numpy(mine)[real], theirs.numpy()[real]) <= FLOAT32_BOUND
    last = backend.numpy(ours.last_hidden_state)
    assert worst_row(last[real], published.last_hidden_state.numpy()[real]) <= FLOAT32_BOUND


def test_attentions_are_those_of_the_published_eager_path(backend):
    """The published default, SDPA, gives a tuple of None and no warning; ours gives weights under both."""
    config, mask = config_of(), mask_named("left")
    ids, real = token_ids(config), mask.astype(bool)
    model = published_model(config, attention="eager", dtype=torch.float32)
    with torch.no_grad():
        published = model(torch.tensor(ids), attention_mask=torch.tensor(mask), output_attentions=True).attentions
    for attention in ("eager", "sdpa"):
        ours = our_model(backend, "pre-norm", attention=attention)(ids, mask, output_attentions=True).attentions
        assert len(ours) == len(published)
        for mine, theirs in zip(ours, published, strict=True):
            mine, theirs = (np.moveaxis(x, 1, 2)[real] for x in (backend.numpy(mine), theirs.double().numpy()))
            assert np.allclose(mine, theirs, atol=2e-6)


def test_embeddings_in_place_of_ids_give_the_published_logits(backend):
    config, mask = config_of("350m style"), mask_named("holes")
    real = mask.astype(bool)
    embeds = np.random.default_rng(0).standard_normal((*mask.shape, config.word_embed_proj_dim)).astype(np.float32)
    with torch.no_grad():
        published = published_model(config)(
            inputs_embeds=torch.tensor(embeds).double(), attention_mask=torch.tensor(mask)
        ).logits.numpy()
    ours = backend.numpy(our_model(backend, "350m style")(inputs_embeds=embeds, attention_mask=mask).logits)
    assert worst_row(ours[real], published[real]) <= FLOAT32_BOUND


def test_given_positions_are_used_as_the_published_model_uses_them(backend):
    """The published TensorFlow class takes `position_ids` and ignores them; ours obeys in all frameworks."""
    config, ids = config_of(), token_ids(config_of(), 2, 5)
    positions = np.array([[3, 0, 40, 7, 7], [1, 2, 3, 4, 5]])
    with torch.no_grad():
        published = published_model(config)(torch.tensor(ids), position_ids=torch.tensor(positions)).logits.numpy()
    ours = backend.numpy(our_model(backend, "pre-norm")(ids, position_ids=positions).logits)
    assert worst_row(ours, published) <= FLOAT32_BOUND


@pytest.mark.parametrize("chunks", [(13,), (5, 1, 7), (1,) * 13], ids=str)
def test_cached_decoding_gives_the_published_logits(backend, chunks):
    """Left-padded; each call is given the mask of all columns so far, as published code does."""
    mask_name, config = "left", config_of()
    ids, mask, model = token_ids(config), mask_named("left"), our_model(backend, "pre-norm")
    cache, start, logits = None, 0, []
    for length in chunks:
        end = start + length
        out = model(ids[:, start:end], mask[:, :end], past_key_values=cache, use_cache=True)
        logits.append(backend.numpy(out.logits))
        cache, start = out.past_key_values, end
    real = mask.astype(bool)
    logits = np.concatenate(logits, axis=1)
    assert worst_row(logits[real], published_logits("pre-norm", mask_name)[real]) <= FLOAT32_BOUND


def test_kept_logits_are_the_last_of_the_published_ones(backend):
    """The published class swallows `logits_to_keep` and returns them all."""
    ids = token_ids(config_of())
    ours = backend.numpy(our_model(backend, "pre-norm")(ids, logits_to_keep=3).logits)
    assert ours.shape[1] == 3
    assert worst_row(ours, published_logits("pre-norm", "none")[:, -3:]) <= FLOAT32_BOUND
