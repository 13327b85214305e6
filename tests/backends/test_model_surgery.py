"""Heads masked and pruned, tables of tokens and positions resized: against the reference, and as laws."""

import numpy as np
import pytest
from harness import (
    BOUND,
    LENGTH,
    PRUNED_HEADS,
    ROUNDOFF,
    config_of,
    mask_named,
    pruned_tensors,
    reference_of,
    rounded_weights,
    save_random,
    token_ids,
    worst_row,
)

from opt_core.errors import ConfigError, InputError
from opt_core.reference import Reference
from opt_core.schema import shapes

BOUND_32 = BOUND["float32"] * ROUNDOFF["float32"]
HEAD_MASK = np.random.default_rng(7).random((3, 5)).astype(np.float32)


def pruned_reference() -> Reference:
    before = config_of()
    after = before.without_heads(PRUNED_HEADS)
    return Reference(after, pruned_tensors(rounded_weights(before), before, after))


def mask_without(heads: dict[int, list[int]]) -> np.ndarray:
    mask_LN = np.ones((3, 5), np.float32)
    for layer, gone in heads.items():
        mask_LN[layer, gone] = 0
    return mask_LN


# -- masks of heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("head_mask", [HEAD_MASK, HEAD_MASK[0]], ids=["of each layer", "of all layers"])
def test_masked_heads_match_the_reference(backend, attn_implementation, head_mask):
    config, reference = config_of(), reference_of(config_of())
    ids = token_ids(config)
    model = backend.random_model(config, attn_implementation=attn_implementation)
    for mask in (None, mask_named("holes")):
        truth = reference.logits(reference(ids, mask, head_mask=head_mask).last_hidden_state)
        got = backend.numpy(model(ids, attention_mask=mask, head_mask=head_mask).logits)
        assert worst_row(got, truth) <= BOUND_32


def test_documents_in_a_row_take_a_mask_of_heads(backend):
    config, reference = config_of(), reference_of(config_of())
    ids, segments = token_ids(config), np.repeat([[1, 1, 1, 1, 2, 2, 2, 5, 5, 5, 5, 5, 7]], 4, axis=0)
    truth = reference.logits(reference(ids, segment_ids=segments, head_mask=HEAD_MASK).last_hidden_state)
    got = backend.numpy(backend.random_model(config)(ids, segment_ids=segments, head_mask=HEAD_MASK).logits)
    assert worst_row(got, truth) <= BOUND_32


def test_a_mask_of_heads_holds_in_cached_steps(backend):
    model = backend.random_model(config_of())
    ids = token_ids(model.config)
    whole = backend.numpy(model(ids, head_mask=HEAD_MASK).logits)
    first = model(ids[:, :7], head_mask=HEAD_MASK, use_cache=True)
    rest = model(ids[:, 7:], head_mask=HEAD_MASK, past_key_values=first.past_key_values)
    assert worst_row(backend.numpy(rest.logits), whole[:, 7:]) <= BOUND_32


def test_attention_weights_are_those_before_the_mask(backend):
    model = backend.random_model(config_of())
    ids = token_ids(model.config)
    only_last = np.ones((3, 5), np.float32)
    only_last[2] = 0  # the layers before it compute what they did
    plain = model(ids, output_attentions=True).attentions
    masked = model(ids, output_attentions=True, head_mask=only_last).attentions
    for got, want in zip(masked, plain, strict=True):
        np.testing.assert_allclose(backend.numpy(got), backend.numpy(want), atol=1e-6)


@pytest.mark.parametrize("task", ["base", "sequence-classification", "question-answering"])
def test_every_class_takes_a_mask_of_heads(backend, task):
    model = backend.random_model(config_of(), task)
    ids = token_ids(model.config)
    name = {"base": "last_hidden_state", "sequence-classification": "logits"}.get(task, "start_logits")
    plain, ones, masked = (
        backend.numpy(getattr(model(ids, head_mask=mask), name)) for mask in (None, np.ones((3, 5)), HEAD_MASK)
    )
    np.testing.assert_array_equal(ones, plain)
    assert np.abs(masked - plain).max() > 1e-3


def test_gradients_pass_through_a_mask_of_heads(backend):
    """Those of a layer of which no head counts are zero."""
    model = backend.random_model(config_of())
    ids, mask = token_ids(model.config), np.ones((3, 5), np.float32)
    mask[1] = 0
    _, gradients = backend.loss_and_gradients(model, input_ids=ids, labels=ids, head_mask=mask)
    assert all((gradients[f"decoder.layers.1.self_attn.{name}.weight"] == 0).all() for name in ("q_proj", "v_proj"))
    assert np.abs(gradients["decoder.layers.2.self_attn.v_proj.weight"]).max() > 1e-4


@pytest.mark.parametrize(
    ("head_mask", "message"),
    [
        (np.ones(3), r"head_mask: expected shape \(3, 5\), or \(5,\) for all layers, got \(3,\)"),
        (np.ones((5, 3)), r"head_mask: expected shape \(3, 5\), .* got \(5, 3\)"),
        (np.full((3, 5), np.nan), "head_mask: expected finite numbers, got nan in layer 0"),
    ],
)
def test_a_wrong_mask_of_heads_is_refused(backend, head_mask, message):
    model = backend.random_model(config_of())
    with pytest.raises(InputError, match=message):
        model(token_ids(model.config), head_mask=head_mask)


# -- pruned heads -----------------------------------------------------------------------------------------------------


def test_a_pruned_head_is_one_that_is_masked(backend):
    model = backend.random_model(config_of())
    ids = token_ids(model.config)
    masked = backend.numpy(model(ids, head_mask=mask_without(PRUNED_HEADS)).logits)
    model.prune_heads(PRUNED_HEADS)
    assert model.config.pruned_heads == PRUNED_HEADS
    for name, shape in shapes(model.config).items():
        assert tuple(model.weight(name).shape) == shape, name
    assert worst_row(backend.numpy(model(ids).logits), masked) <= BOUND_32


def test_a_mask_keeps_the_first_numbering_of_heads(backend):
    model, reference = backend.random_model(config_of()), pruned_reference()
    model.prune_heads(PRUNED_HEADS)
    ids = token_ids(model.config)
    truth = reference.logits(reference(ids, head_mask=HEAD_MASK).last_hidden_state)
    assert worst_row(backend.numpy(model(ids, head_mask=HEAD_MASK).logits), truth) <= BOUND_32


def test_pruning_in_steps_is_pruning_at_once_and_twice_is_once(backend):
    at_once, in_steps = (backend.random_model(config_of()) for _ in range(2))
    at_once.prune_heads(PRUNED_HEADS)
    for heads in ({2: [2]}, {0: [4, 1]}, {2: [0, 3], 0: [1]}, {2: [2], 0: []}):
        in_steps.prune_heads(heads)
    assert in_steps.config == at_once.config
    for name in shapes(at_once.config):
        np.testing.assert_array_equal(backend.numpy(in_steps.weight(name)), backend.numpy(at_once.weight(name)))


def test_pruning_leaves_the_config_of_the_user_as_it_is(backend):
    config = config_of()
    model = backend.model_class()(config)
    twin = backend.model_class()(config)
    model.prune_heads({1: [3]})
    assert config.pruned_heads == {}
    assert twin.config.heads_of(1) == 5
    assert model.config.heads_of(1) == model.base_model.config.heads_of(1) == 4


def test_pruned_models_are_saved_in_one_backend_and_load_in_each(backend, backends, tmp_path):
    model, reference = backend.random_model(config_of()), pruned_reference()
    model.prune_heads(PRUNED_HEADS)
    model.save_pretrained(tmp_path)
    ids = token_ids(model.config)
    truth = reference.logits(reference(ids).last_hidden_state)
    for other in backends:
        loaded = other.model_class().from_pretrained(tmp_path)
        assert loaded.config.pruned_heads == PRUNED_HEADS
        assert worst_row(other.numpy(loaded(ids).logits), truth) <= BOUND_32, other


def test_a_pruned_model_generates_on_caches_of_the_heads_that_remain(backend):
    model, reference = backend.random_model(config_of()), pruned_reference()
    model.prune_heads(PRUNED_HEADS)
    ids = token_ids(model.config, 2, 7)
    cache = model(ids, use_cache=True).past_key_values
    assert [keys.shape[1] for keys in cache.keys] == [3, 5, 2]
    text = np.asarray(model.generate(ids, max_new_tokens=5))
    assert text.shape == (2, 12)
    for T in range(7, 12):
        logits_BV = reference.logits(reference(text[:, :T]).last_hidden_state)[:, -1]
        assert (logits_BV.argmax(-1) == text[:, T]).all()
    beams = np.asarray(model.generate(ids, max_new_tokens=3, num_beams=2))
    assert beams.shape == (2, 10)


def test_a_cache_of_all_heads_is_refused_by_a_pruned_model(backend):
    model = backend.random_model(config_of())
    ids = token_ids(model.config)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    model.prune_heads({2: [1]})
    with pytest.raises(InputError, match="expected a cache of 4 heads of size 7 in layer 2, got 5 of size 7"):
        model(ids[:, 5:], past_key_values=cache)


def test_gradients_of_a_pruned_model_are_those_of_the_masked_one(backend):
    model = backend.random_model(config_of())
    ids = token_ids(model.config)
    _, masked = backend.loss_and_gradients(model, input_ids=ids, labels=ids, head_mask=mask_without(PRUNED_HEADS))
    before = model.config
    model.prune_heads(PRUNED_HEADS)
    _, pruned = backend.loss_and_gradients(model, input_ids=ids, labels=ids)
    for name, want in pruned_tensors(masked, before, model.config).items():
        np.testing.assert_allclose(pruned[name], want, atol=1e-6, err_msg=name)


def test_all_that_is_wrong_with_heads_to_prune_is_said_at_once(backend):
    model = backend.random_model(config_of())
    ids = token_ids(model.config)
    before = backend.numpy(model(ids).logits)
    with pytest.raises(ConfigError) as caught:
        model.prune_heads({0: [1], 3: [0], 1: [5, -1], 2: [0, 1, 2, 3, 4]})
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    for words in ("layers from 0 to 2, got 3", "heads from 0 to 4 in layer 1", "one head to remain in layer 2"):
        assert words in problems
    assert model.config.pruned_heads == {}
    np.testing.assert_array_equal(backend.numpy(model(ids).logits), before)


# -- tables -----------------------------------------------------------------------------------------------------------


def test_more_positions_keep_the_first_and_make_room(backend, tmp_path):
    config = config_of(num_hidden_layers=1)
    model, limit = backend.random_model(config), config.max_position_embeddings
    ids, long = token_ids(config), token_ids(config, 2, limit + 6)
    before = backend.numpy(model(ids).logits)
    with pytest.raises(InputError, match="max_position_embeddings = 41"):
        model(long)
    model.resize_position_embeddings(limit + 12)
    np.testing.assert_allclose(backend.numpy(model(ids).logits), before, atol=1e-6)
    assert (config.max_position_embeddings, model.config.max_position_embeddings) == (limit, limit + 12)
    new_rows = backend.numpy(model.weight("decoder.embed_positions.weight"))[limit + 2 :]
    assert new_rows.shape == (12, 35)
    assert new_rows.std() == pytest.approx(config.init_std, rel=0.2)
    assert np.asarray(model.generate(long, max_new_tokens=5)).shape == (2, limit + 11)
    _, gradients = backend.loss_and_gradients(model, input_ids=long, labels=long)
    assert (np.abs(gradients["decoder.embed_positions.weight"][limit + 2 : limit + 7]).max(1) > 0).all()
    model.save_pretrained(tmp_path)
    again = backend.model_class().from_pretrained(tmp_path)
    np.testing.assert_allclose(backend.numpy(again(long).logits), backend.numpy(model(long).logits), atol=1e-6)


def test_fewer_positions_refuse_what_no_longer_fits(backend):
    model = backend.random_model(config_of(num_hidden_layers=1))
    ids = token_ids(model.config)
    before = backend.numpy(model(ids).logits)
    model.resize_position_embeddings(LENGTH)
    np.testing.assert_allclose(backend.numpy(model(ids).logits), before, atol=1e-6)
    with pytest.raises(InputError, match=f"max_position_embeddings = {LENGTH}"):
        model(token_ids(model.config, 2, LENGTH + 1))


@pytest.mark.parametrize("variant", ["pre-norm", "350m style", "untied head"])
def test_gradients_after_resizing_the_vocabulary_are_those_of_a_model_of_that_size(backend, variant, tmp_path):
    """With a tied head, one gradient of both uses; with an untied one, one for each."""
    config = config_of(variant, num_hidden_layers=1)
    model = backend.random_model(config)
    model.resize_token_embeddings(101)
    assert (config.vocab_size, model.config.vocab_size) == (97, 101)
    model.save_pretrained(tmp_path)
    twin = backend.model_class().from_pretrained(tmp_path)
    ids = token_ids(model.config)
    ids[0, :4] = 97, 98, 99, 100
    results = [backend.loss_and_gradients(some, input_ids=ids, labels=ids) for some in (model, twin)]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, want in results[1][1].items():
        np.testing.assert_allclose(results[0][1][name], want, atol=1e-6, err_msg=name)
    for name in {"decoder.embed_tokens.weight", "lm_head.weight"} & results[0][1].keys():
        assert (np.abs(results[0][1][name][97:]).max(1) > 0).all(), name


def test_pruned_heads_and_more_positions_survive_together(backend, tmp_path):
    save_random(tmp_path, config_of())
    model = backend.model_class().from_pretrained(tmp_path)
    model.prune_heads({1: [0, 4]})
    model.resize_position_embeddings(53)
    model.resize_token_embeddings(103)
    model.save_pretrained(tmp_path / "after")
    again = backend.model_class().from_pretrained(tmp_path / "after")
    assert again.config == model.config.replace(torch_dtype="float32")
    ids = token_ids(model.config, 2, 47)
    np.testing.assert_allclose(backend.numpy(again(ids).logits), backend.numpy(model(ids).logits), atol=1e-6)
