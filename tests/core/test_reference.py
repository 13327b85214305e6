"""The float64 reference against laws that hold for any weights, and against numbers worked out by hand."""

import math

import numpy as np
import pytest
from harness import (
    MASKS,
    PRUNED_HEADS,
    VARIANTS,
    config_of,
    mask_named,
    pruned_tensors,
    reference_of,
    rounded_weights,
    token_ids,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_core import OPTConfig
from opt_core.reference import (
    Reference,
    causal_lm_loss,
    classification_loss,
    cross_entropy,
    masked_softmax,
    question_answering_loss,
)
from opt_core.synthetic import random_tensors

LN2 = math.log(2)


def rows(*drawn: str) -> np.ndarray:
    """A mask drawn as rows of 0 and 1."""
    return np.array([[int(c) for c in row] for row in drawn])


def same(got, expected) -> bool:
    """Equal but for the order in which float64 sums are taken."""
    return np.allclose(got, expected, rtol=1e-12, atol=1e-12)


# -- by hand ----------------------------------------------------------------------------------------------------------


def tiny(**changes) -> Reference:
    """Two tokens of width 2, one layer, one head: all weights zero but those named."""
    sizes = dict(vocab_size=2, hidden_size=2, num_hidden_layers=1, ffn_dim=1, num_attention_heads=1)
    config = OPTConfig(**sizes, max_position_embeddings=2, pad_token_id=None, do_layer_norm_before=False)
    weights = {name: np.zeros_like(w) for name, w in random_tensors(config)}
    layer = "decoder.layers.0"
    weights[f"{layer}.self_attn_layer_norm.weight"][:] = 1
    weights[f"{layer}.final_layer_norm.weight"][:] = 1
    weights["decoder.embed_tokens.weight"][:] = [[1, 0], [0, 1]]
    return Reference(config, weights | {f"decoder.{name}": np.array(w) for name, w in changes.items()})


def test_one_layer_worked_out_by_hand():
    """Positions add (0, 2) to token 0 and (4, 0) to token 1; values are copied, keys and queries are zero.

    Token 0 attends to itself: (1, 2) + (1, 2) = (2, 4), whose norm is (-1, 1). Token 1 attends to both alike:
    (4, 1) + (2.5, 1.5) = (6.5, 2.5), whose norm is (1, -1). The feed-forward adds max(first - 0.5, 0) to the first.
    """
    eye = [[1, 0], [0, 1]]
    reference = tiny(
        **{
            "embed_positions.weight": [[9, 9], [9, 9], [0, 2], [4, 0]],
            "layers.0.self_attn.v_proj.weight": eye,
            "layers.0.self_attn.out_proj.weight": eye,
            "layers.0.fc1.weight": [[1, 0]],
            "layers.0.fc1.bias": [-0.5],
            "layers.0.fc2.weight": [[1], [0]],
        }
    )
    out = reference([[0, 1]])
    assert out.hidden_states[0][0].tolist() == [[1, 2], [4, 1]]
    assert out.attentions[0][0, 0].tolist() == [[1, 0], [0.5, 0.5]]

    def norm(half_difference):  # of two numbers that far from their mean
        return half_difference / math.sqrt(half_difference**2 + 1e-5)

    first, second = norm(norm(1.0)), norm(2.0)
    second = norm((second + (second - 0.5) + second) / 2)
    assert same(out.last_hidden_state[0], [[-first, first], [second, -second]])
    assert same(reference.logits(out.last_hidden_state), out.last_hidden_state)  # the words are the unit vectors


def test_the_query_is_scaled_by_the_root_of_the_head_size():
    """Token 1 has query (2, 0) and keys (0, 0) and (ln 3, 0): weights 1 : 3 ** (2 / sqrt 2)."""
    reference = tiny(
        **{
            "layers.0.self_attn.q_proj.bias": [2, 0],
            "layers.0.self_attn.k_proj.weight": [[0, math.log(3)], [0, 0]],
        }
    )
    first, second = reference([[0, 1]]).attentions[0][0, 0, 1]
    assert math.isclose(second / first, 3 ** math.sqrt(2), rel_tol=1e-12)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("relu", [0, 0, 2]),
        ("gelu", [-0.15865525393145707, 0, 1.9544997361036416]),  # x Phi(x), from tables of the normal distribution
        ("gelu_new", [-0.1588080093917233, 0, 1.954597694087775]),
        ("silu", [-1 / (1 + math.e), 0, 2 / (1 + math.exp(-2))]),
        (np.square, [1, 0, 4]),
    ],
)
def test_an_activation_has_its_published_values(activation, expected):
    reference = reference_of(config_of(activation_function="relu"))
    config = reference.config.replace(activation_function=activation)
    activated = Reference(config, reference.weights).activation(np.array([-1.0, 0.0, 2.0]))
    assert np.allclose(activated, expected, rtol=1e-9, atol=1e-12)


# -- heads ------------------------------------------------------------------------------------------------------------


def test_a_pruned_head_is_a_head_whose_mask_is_zero():
    whole = config_of()
    pruned = whole.without_heads(PRUNED_HEADS)
    tensors, ids = rounded_weights(whole), token_ids(whole)
    head_mask_LN = np.ones((whole.num_hidden_layers, whole.num_attention_heads))
    for layer, heads in PRUNED_HEADS.items():
        head_mask_LN[layer, heads] = 0
    masked = Reference(whole, tensors)(ids, mask_named("holes"), head_mask=head_mask_LN)
    got = Reference(pruned, pruned_tensors(tensors, whole, pruned))(ids, mask_named("holes"))
    assert same(got.last_hidden_state, masked.last_hidden_state)
    for layer in range(whole.num_hidden_layers):
        assert same(got.attentions[layer], masked.attentions[layer][:, pruned.remaining_heads(layer)])


def test_a_mask_of_ones_changes_nothing_and_one_of_all_layers_is_that_of_each():
    config = config_of("350m style")
    reference, ids = reference_of(config), token_ids(config)
    head_mask_N = np.linspace(-1, 2, config.num_attention_heads)
    plain, ones = (reference(ids, head_mask=mask).last_hidden_state for mask in (None, np.ones(5)))
    one, each = (reference(ids, head_mask=mask).last_hidden_state for mask in (head_mask_N, [head_mask_N] * 3))
    assert np.array_equal(plain, ones)
    assert np.array_equal(one, each)
    assert not np.allclose(one, plain)


def test_the_mask_of_a_pruned_model_keeps_the_old_numbering_and_ignores_what_is_pruned():
    whole = config_of()
    pruned = whole.without_heads({1: [0, 3]})
    tensors, ids = rounded_weights(whole), token_ids(whole)
    head_mask_LN = np.random.default_rng(0).uniform(0, 1, (3, 5))
    there, gone = head_mask_LN.copy(), head_mask_LN.copy()
    there[1, [0, 3]], gone[1, [0, 3]] = 0, np.nan
    masked = Reference(whole, tensors)(ids, head_mask=there).last_hidden_state
    got = Reference(pruned, pruned_tensors(tensors, whole, pruned))(ids, head_mask=gone).last_hidden_state
    assert same(got, masked)


# -- laws of padding and time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_changing_a_later_token_changes_nothing_earlier(variant):
    config = config_of(variant)
    reference, ids = reference_of(config), token_ids(config, 2, 7)
    changed = ids.copy()
    changed[:, 4] = (changed[:, 4] + 1) % config.vocab_size
    before, after = (reference(x).last_hidden_state for x in (ids, changed))
    assert np.array_equal(before[:, :4], after[:, :4])
    later = slice(4, 5) if config.num_hidden_layers == 0 else slice(4, None)  # without layers, tokens do not meet
    assert (before[:, later] != after[:, later]).any(-1).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mask_name", [name for name in MASKS if name != "none"])
def test_padding_anywhere_gives_what_the_real_tokens_give_alone_and_zero_elsewhere(variant, mask_name):
    config, mask = config_of(variant), mask_named(mask_name)
    reference, ids = reference_of(config), token_ids(config)
    out = reference(ids, mask)
    for row, real in enumerate(mask.astype(bool)):
        assert not out.last_hidden_state[row, ~real].any()
        assert not any(states[row, ~real].any() for states in out.hidden_states)
        assert not any(weights[row][:, ~real].any() or weights[row][:, :, ~real].any() for weights in out.attentions)
        if real.any():
            alone = reference(ids[row : row + 1, real])
            assert same(out.last_hidden_state[row, real], alone.last_hidden_state[0])
            for weights, weights_alone in zip(out.attentions, alone.attentions, strict=True):
                assert same(weights[row][:, real][:, :, real], weights_alone[0])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_where_padding_stands_does_not_matter(data):
    """Packing law: any two masks with as many ones give the real tokens the same hidden states."""
    length, count = 9, data.draw(st.integers(1, 6))
    reference = reference_of(config_of(num_hidden_layers=1))
    tokens = data.draw(st.lists(st.integers(0, 96), min_size=count, max_size=count))
    states = []
    for _ in range(2):
        columns = sorted(data.draw(st.permutations(range(length)))[:count])
        ids, mask = np.full((1, length), data.draw(st.integers(0, 96))), np.zeros((1, length), int)
        ids[0, columns], mask[0, columns] = tokens, 1
        states.append(reference(ids, mask).last_hidden_state[0, columns])
    assert same(*states)


def test_the_ids_of_padding_do_not_matter():
    config, mask = config_of(), mask_named("holes")
    reference, ids = reference_of(config), token_ids(config)
    other = np.where(mask, ids, token_ids(config, seed=1))
    assert (other != ids).any()
    assert np.array_equal(reference(ids, mask).last_hidden_state, reference(other, mask).last_hidden_state)


def test_a_row_of_padding_alone_is_zero():
    config = config_of()
    out = reference_of(config)(token_ids(config, 2, 5), rows("00000", "00111"))
    assert not out.last_hidden_state[0].any()
    assert np.isfinite(out.last_hidden_state).all()


def test_positions_count_the_real_tokens_before():
    config = config_of()
    reference, ids = reference_of(config), token_ids(config, 2, 5)
    mask, positions = rows("01011", "11111"), [[40, 0, 40, 1, 2], [0, 1, 2, 3, 4]]
    expected = reference(ids, mask).last_hidden_state
    assert np.array_equal(reference(ids, mask, np.array(positions)).last_hidden_state, expected)
    assert not same(reference(ids, mask, np.array([[1, 2, 3, 4, 5]])).last_hidden_state, expected)


def test_position_zero_is_row_two_of_the_table_and_the_rows_before_are_never_read():
    config = config_of(num_hidden_layers=0)
    reference = reference_of(config)
    table, words = (reference.weights[f"decoder.embed_{name}.weight"] for name in ("positions", "tokens"))
    expected = table[2] + words[7]
    table[:2] = np.nan
    out = reference([[0, 7]], rows("01"))
    assert np.array_equal(out.hidden_states[0][0, 1], reference.layer_norm("decoder.final_layer_norm", expected))
    assert np.isfinite(out.last_hidden_state).all()


def test_embeddings_in_place_of_ids_give_the_same():
    config = config_of("350m style")
    reference, ids = reference_of(config), token_ids(config)
    embeds = reference.weights["decoder.embed_tokens.weight"][ids]
    mask = mask_named("left")
    from_ids, from_embeds = reference(ids, mask), reference(attention_mask=mask, inputs_embeds=embeds)
    assert np.array_equal(from_ids.last_hidden_state, from_embeds.last_hidden_state)


def test_hidden_states_are_the_inputs_of_the_layers_and_the_output():
    config = config_of("350m style")
    reference = reference_of(config)
    out = reference(token_ids(config))
    assert len(out.hidden_states) == config.num_hidden_layers + 1
    assert [states.shape[-1] for states in out.hidden_states] == [35, 35, 35, 19]
    assert np.array_equal(out.hidden_states[-1], out.last_hidden_state)
    attend = np.broadcast_to(np.tri(13, dtype=bool), (4, 13, 13))
    (of_layer_0, _) = reference.layer("decoder.layers.0", out.hidden_states[0], attend, np.ones(5))
    assert np.array_equal(of_layer_0, out.hidden_states[1])


def test_the_head_is_the_word_embeddings_unless_it_is_untied():
    tied, untied = (reference_of(config_of(name)) for name in ("pre-norm", "untied head"))
    hidden = np.ones((1, 1, 35))
    assert np.array_equal(tied.logits(hidden)[0, 0], tied.weights["decoder.embed_tokens.weight"].sum(1))
    assert same(untied.logits(hidden)[0, 0], untied.weights["lm_head.weight"].sum(1))
    assert not same(tied.logits(hidden), untied.logits(hidden))


# -- heads ------------------------------------------------------------------------------------------------------------


def test_classification_reads_the_last_real_token_of_each_row():
    config = config_of(num_labels=3)
    reference = reference_of(config, "sequence-classification")
    hidden = np.random.default_rng(0).standard_normal((4, 5, 35))
    logits = reference.classify(hidden, rows("00111", "11100", "01010", "00000"))
    last = np.stack([hidden[0, 4], hidden[1, 2], hidden[2, 3], np.zeros(35)])
    assert same(logits, last @ reference.weights["score.weight"].T)
    assert same(reference.classify(hidden), hidden[:, -1] @ reference.weights["score.weight"].T)


def test_answers_have_logits_at_real_tokens_and_zero_at_padding():
    reference = reference_of(config_of(), "question-answering")
    hidden = np.random.default_rng(0).standard_normal((2, 3, 35))
    mask = rows("011", "110")
    start, end = reference.answer_spans(hidden, mask)
    expected = hidden @ reference.weights["qa_outputs.weight"].T + reference.weights["qa_outputs.bias"]
    assert same(start[mask == 1], expected[mask == 1][:, 0])
    assert same(end[mask == 1], expected[mask == 1][:, 1])
    assert not start[mask == 0].any()
    assert not end[mask == 0].any()


# -- softmax ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.booleans()), min_size=1, max_size=7))
def test_a_masked_softmax_is_a_distribution_over_what_it_may_attend_to(pairs):
    scores, attend = np.array([s for s, _ in pairs]), np.array([a for _, a in pairs])
    weights = masked_softmax(scores, attend)
    assert (weights >= 0).all()
    assert not weights[~attend].any()
    assert math.isclose(weights.sum(), float(attend.any()), rel_tol=1e-12)
    if attend.any():
        alone = np.exp(scores[attend] - scores[attend].max())
        assert same(weights[attend], alone / alone.sum())


def test_a_softmax_does_not_change_when_all_scores_rise_together():
    scores, attend = np.array([1.0, -2.0, 3.0]), np.array([True, True, False])
    assert same(masked_softmax(scores + 1e3, attend), masked_softmax(scores, attend))


# -- losses -----------------------------------------------------------------------------------------------------------


def test_cross_entropy_of_equal_logits_is_the_logarithm_of_their_number():
    counted = np.array([True, True, False])
    assert math.isclose(cross_entropy(np.full((3, 5), 1e3), np.array([0, 4, 2]), counted), math.log(5))
    assert cross_entropy(np.zeros((3, 5)), np.array([0, 4, 2]), np.zeros(3, bool)) == 0


def test_a_language_model_loss_worked_out_by_hand():
    """Logits (0, ln 3) give token 1 the probability 3/4; only the labels after the first are predicted."""
    logits = np.broadcast_to([0, math.log(3)], (1, 4, 2))
    assert math.isclose(causal_lm_loss(logits, np.array([[0, 1, 1, 0]])), (2 * math.log(4 / 3) + math.log(4)) / 3)
    assert math.isclose(causal_lm_loss(logits, np.array([[1, 1, -100, 0]])), (math.log(4 / 3) + math.log(4)) / 2)
    assert causal_lm_loss(logits, np.array([[1, -100, -100, -100]])) == 0


def test_a_prediction_made_at_padding_is_not_counted_but_the_prediction_of_a_label_there_is():
    logits = np.array([[[5.0, 0.0], [0.0, 0.0], [0.0, math.log(3)], [7.0, 0.0]]])
    labels = np.array([[-100, 1, 1, 0]])
    assert math.isclose(causal_lm_loss(logits, labels, rows("0111")), (LN2 + math.log(4)) / 2)
    assert math.isclose(causal_lm_loss(logits, labels, rows("0110")), (LN2 + math.log(4)) / 2)


def test_the_loss_does_not_depend_on_the_side_of_the_padding():
    config = config_of()
    reference, ids = reference_of(config), token_ids(config, 1, 5)[0]
    losses = []
    for mask in (rows("00011111"), rows("11111000")):
        padded, labels = np.full((1, 8), 1), np.full((1, 8), -100)
        padded[mask == 1] = labels[mask == 1] = ids
        losses.append(causal_lm_loss(reference.logits(reference(padded, mask).last_hidden_state), labels, mask))
    assert math.isclose(*losses, rel_tol=1e-12)


def test_question_answering_averages_start_and_end_over_real_positions():
    start, end = np.zeros((2, 4)), np.zeros((2, 4))
    mask = rows("0111", "0011")
    expected = ((math.log(3) + LN2) / 2 + math.log(3)) / 2
    assert math.isclose(question_answering_loss(start, end, [1, 2], [3, 9], mask), expected)
    assert math.isclose(question_answering_loss(start, end, [0, 3], [-100, 9]), math.log(4) / 2)


def test_single_label_classification_ignores_what_is_labelled_so():
    logits = np.array([[0.0, math.log(3)], [9.0, 0.0]])
    loss = classification_loss(logits, np.array([1, -100]), "single_label_classification")
    assert math.isclose(loss, math.log(4 / 3))


def test_regression_is_the_mean_squared_error():
    assert classification_loss(np.array([[1.0], [3.0]]), np.array([0.0, 5.0]), "regression") == 2.5
    assert classification_loss(np.array([[1.0, 3.0]]), np.array([[0.0, 5.0]]), "regression") == 2.5


def test_multi_label_classification_is_binary_cross_entropy_per_label():
    """The probability of each label is 3/4; one of the two is there."""
    logits = np.full((1, 2), math.log(3))
    loss = classification_loss(logits, np.array([[1.0, 0.0]]), "multi_label_classification")
    assert math.isclose(loss, (math.log(4 / 3) + math.log(4)) / 2)
    assert np.isfinite(classification_loss(np.array([[-1e4]]), np.array([[0.0]]), "multi_label_classification"))
