"""Several documents in a row (`segment_ids`): the same numbers as each document alone."""

import numpy as np
import pytest
from harness import (
    BOUND,
    MASKS,
    ROUNDOFF,
    config_of,
    mask_named,
    reference_of,
    token_ids,
    worst_row,
)

from opt_core.errors import InputError
from opt_core.reference import IGNORED_LABEL, causal_lm_loss, number_documents

# Rows of documents; an id that comes again later is another document.
SEGMENTS = np.array(
    [[int(c) for c in row] for row in ["1111222222233", "7777777777777", "0123456789012", "1122211112222"]]
)


def documents_apart(ids_BT, mask_BT) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.ndarray]]]:
    """Each document as a row of its own, padded on the right; the mask; and the row and columns it came from."""
    real_BT = np.ones(ids_BT.shape, bool) if mask_BT is None else mask_BT != 0
    numbers_BT = number_documents(SEGMENTS, real_BT)
    places = [
        (row, columns)
        for row in range(len(ids_BT))
        for number in range(numbers_BT[row].max() + 1)
        if len(columns := np.flatnonzero(real_BT[row] & (numbers_BT[row] == number)))
    ]
    ids, mask = np.zeros((2, len(places), ids_BT.shape[1]), int)
    for i, (row, columns) in enumerate(places):
        ids[i, : len(columns)] = ids_BT[row, columns]
        mask[i, : len(columns)] = 1
    return ids, mask, places


@pytest.mark.parametrize("mask_name", list(MASKS))
def test_the_reference_computes_documents_as_if_alone(mask_name):
    config, mask_BT = config_of(), mask_named(mask_name)
    reference, ids_BT = reference_of(config), token_ids(config)
    together = reference(ids_BT, mask_BT, segment_ids=SEGMENTS).last_hidden_state
    ids, mask, places = documents_apart(ids_BT, mask_BT)
    apart = reference(ids, mask).last_hidden_state
    for i, (row, columns) in enumerate(places):
        np.testing.assert_allclose(together[row, columns], apart[i, : len(columns)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask_name", list(MASKS))
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_documents_in_a_row_match_the_reference(backend, dtype, attn_implementation, mask_name):
    config, mask_BT = config_of(), mask_named(mask_name)
    ids_BT = token_ids(config)
    reference = reference_of(config, dtype=dtype)
    truth = reference.logits(reference(ids_BT, mask_BT, segment_ids=SEGMENTS).last_hidden_state)
    model = backend.random_model(config, dtype=dtype, attn_implementation=attn_implementation)
    logits = backend.numpy(model(ids_BT, attention_mask=mask_BT, segment_ids=SEGMENTS).logits)
    if mask_BT is not None:
        assert (logits[mask_BT == 0] == 0).all()
    assert worst_row(logits, truth) <= BOUND[dtype] * ROUNDOFF[dtype]


@pytest.mark.parametrize("variant", ["350m style", "post-norm without projections"])
def test_documents_in_a_row_match_the_reference_in_other_variants(backend, variant):
    config, mask_BT = config_of(variant), mask_named("holes")
    ids_BT, reference = token_ids(config), reference_of(config)
    truth = reference(ids_BT, mask_BT, segment_ids=SEGMENTS).last_hidden_state
    model = backend.random_model(config, "base")
    out = model(ids_BT, attention_mask=mask_BT, segment_ids=SEGMENTS)
    assert out.past_key_values is None
    assert worst_row(backend.numpy(out.last_hidden_state), truth) <= BOUND["float32"] * ROUNDOFF["float32"]


def test_no_token_attends_to_another_document(backend):
    config = config_of()
    model = backend.random_model(config)
    out = model(token_ids(config), segment_ids=SEGMENTS, output_attentions=True)
    numbers_BT = number_documents(SEGMENTS, np.ones(SEGMENTS.shape, bool))
    sees_BTT = np.tri(SEGMENTS.shape[1], dtype=bool) & (numbers_BT[:, :, None] == numbers_BT[:, None, :])
    for weights_BNTS in map(backend.numpy, out.attentions):
        assert ((weights_BNTS > 0) == sees_BTT[:, None]).all()


@pytest.mark.parametrize("mask_name", ["none", "right"])
def test_loss_and_gradients_are_those_of_the_documents_apart(backend, mask_name):
    """The mean over the same predictions: those made inside a document."""
    config, mask_BT = config_of(), mask_named(mask_name)
    ids_BT = token_ids(config)
    ids, mask, _ = documents_apart(ids_BT, mask_BT)
    labels_BT = ids_BT if mask_BT is None else np.where(mask_BT, ids_BT, IGNORED_LABEL)
    model = backend.random_model(config)
    together = backend.loss_and_gradients(
        model, input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT, segment_ids=SEGMENTS
    )
    apart = backend.loss_and_gradients(
        model, input_ids=ids, attention_mask=mask, labels=np.where(mask, ids, IGNORED_LABEL)
    )
    logits = reference_of(config).logits(reference_of(config)(ids_BT, mask_BT, segment_ids=SEGMENTS).last_hidden_state)
    assert together[0] == pytest.approx(causal_lm_loss(logits, labels_BT, mask_BT, SEGMENTS), rel=1e-6)
    assert together[0] == pytest.approx(apart[0], rel=1e-6)
    for name, gradient in together[1].items():
        error = np.linalg.norm(gradient - apart[1][name])
        assert error <= 1e-5 * np.linalg.norm(apart[1][name]) + 3e-8, name  # 1e-8: k_proj.bias, 0 but for rounding


def test_positions_may_be_given(backend):
    config = config_of()
    ids_BT, positions_BT = token_ids(config), np.random.default_rng(3).integers(0, 41, SEGMENTS.shape)
    truth = reference_of(config)(ids_BT, None, positions_BT, segment_ids=SEGMENTS).last_hidden_state
    model = backend.random_model(config, "base")
    hidden = backend.numpy(model(ids_BT, position_ids=positions_BT, segment_ids=SEGMENTS).last_hidden_state)
    assert worst_row(hidden, truth) <= BOUND["float32"] * ROUNDOFF["float32"]


def test_only_a_document_must_fit_the_position_table(backend):
    """A row of two documents may be longer."""
    config = config_of()
    limit = config.max_position_embeddings
    ids = token_ids(config, 1, limit + 19)
    segments = (np.arange(limit + 19) >= limit)[None].astype(int)
    model = backend.random_model(config)
    truth = reference_of(config)(ids, segment_ids=segments).last_hidden_state
    hidden = backend.numpy(model(ids, segment_ids=segments, output_hidden_states=True).hidden_states[-1])
    assert worst_row(hidden, truth) <= BOUND["float32"] * ROUNDOFF["float32"]
    with pytest.raises(
        InputError, match=f"at most max_position_embeddings = {limit} real tokens a document, got {limit + 1}"
    ):
        model(ids, segment_ids=np.roll(segments, 1, axis=1) * (np.arange(limit + 19) > limit))


def test_what_cannot_be_meant_is_refused_together(backend):
    config = config_of()
    model, ids = backend.random_model(config), token_ids(config)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(InputError) as caught:
        model(ids, segment_ids=SEGMENTS[:, 1:] / 2, past_key_values=cache, use_cache=True)
    text = str(caught.value)
    assert "segment_ids: expected an integer dtype, got float" in text
    assert "segment_ids: expected shape (4, 13), got (4, 12)" in text
    assert "segment_ids: expected no past_key_values beside it" in text
    assert "segment_ids: expected use_cache=False beside it" in text


@pytest.mark.parametrize("task", ["sequence-classification", "question-answering"])
def test_tasks_with_one_answer_a_row_do_not_take_documents(backend, task):
    config = config_of()
    with pytest.raises(TypeError, match="segment_ids"):
        backend.random_model(config, task)(token_ids(config), segment_ids=SEGMENTS)
