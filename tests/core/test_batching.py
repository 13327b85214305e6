"""Packed and padded batches: every token once, documents apart, an order that depends on seed and epoch alone."""

import numpy as np
import pytest
from harness import config_of, reference_of, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_core.batching import Batches, PackedDocuments, count_targets, pad_rows, permutation
from opt_core.errors import InputError
from opt_core.reference import causal_lm_loss

LENGTH = 7
DOCUMENTS = [[2, *range(10 * size, 11 * size)] for size in (3, 11, 1, 5, 2, 17)]
documents_of_any_size = st.lists(st.lists(st.integers(4, 96), min_size=1, max_size=23), min_size=1, max_size=7)


def numbered(count: int) -> list[dict]:
    return [{"input_ids": np.full(5, number), "labels": np.int64(number)} for number in range(count)]


def seen(batches: Batches, first: int, last: int) -> list[int]:
    return [int(label) for step in range(first, last) for label in batches.at(step)["labels"]]


# -- packing ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(documents_of_any_size, st.integers(2, 13), st.booleans())
def test_each_token_appears_once_and_in_order(documents, length, separate):
    rows = PackedDocuments(documents, length, separate_documents=separate, end_token_id=None)
    labels = np.concatenate([row["labels"] for row in rows])
    assert labels[labels != -100].tolist() == [token for document in documents for token in document]
    assert all(row["input_ids"].shape == row["labels"].shape == (length,) for row in rows)
    assert len(rows) == -(-sum(map(len, documents)) // length)


def test_each_separate_document_ends_with_the_token_that_ends_a_text():
    rows = PackedDocuments(DOCUMENTS, LENGTH)
    assert rows.ids.tolist() == [token for document in DOCUMENTS for token in [*document, 2]]
    stream = PackedDocuments(DOCUMENTS, LENGTH, separate_documents=False)
    assert stream.ids.tolist() == [token for document in DOCUMENTS for token in document]
    assert "segment_ids" not in stream[0]


@settings(max_examples=50, deadline=None)
@given(documents_of_any_size, st.integers(2, 13))
def test_segments_are_the_documents_cut_at_the_ends_of_rows(documents, length):
    expected, room = [], length
    for document in documents:
        rest = [*document, 2]
        while rest:
            expected.append(rest[:room])
            room, rest = (room - len(rest[:room])) or length, rest[room:]
    pieces = []
    for row in PackedDocuments(documents, length):
        real = row["labels"] != -100
        borders = np.flatnonzero(np.diff(row["segment_ids"][real])) + 1
        pieces += [piece.tolist() for piece in np.split(row["input_ids"][real], borders)]
        assert len(np.unique(row["segment_ids"][real])) == len(borders) + 1
        assert not set(row["segment_ids"][real]) & set(row["segment_ids"][~real])
    assert pieces == expected


def test_targets_are_counted_as_the_loss_counts_them():
    """A logit of the right token that is 1 higher than the others: each counted target has the same loss."""
    rng = np.random.default_rng(0)
    batch = dict(Batches(PackedDocuments(DOCUMENTS, LENGTH), 3).at(0), attention_mask=rng.integers(0, 2, (3, LENGTH)))
    for names in (("labels",), ("labels", "segment_ids"), ("labels", "attention_mask"), tuple(batch)):
        chosen = {name: batch[name] for name in names}
        masks = {name: batch[name] for name in ("attention_mask", "segment_ids") if name in names}
        losses = rng.random((3, LENGTH, 211))
        mean = causal_lm_loss(losses, batch["labels"], **masks)
        total = 0.0
        for row in range(3):
            for column in range(1, LENGTH):  # one target at a time
                single = np.full_like(batch["labels"], -100)
                single[row, column] = batch["labels"][row, column]
                total += causal_lm_loss(losses, single, **masks)
        assert mean * count_targets(chosen) == pytest.approx(total)
        assert 0 < count_targets(chosen) < 3 * LENGTH


@pytest.mark.parametrize("length", [5, 7, 41])
def test_packed_documents_give_the_hidden_states_and_loss_of_documents_apart(length):
    config = config_of()
    reference = reference_of(config)
    documents = [ids.tolist() for ids in np.split(token_ids(config, 1, 29)[0], [3, 4, 15])]
    losses, counts = [], []
    for row in PackedDocuments(documents, length):
        ids, segments = row["input_ids"], row["segment_ids"]
        hidden = reference(ids[None], segment_ids=segments[None]).last_hidden_state
        total = 0.0
        for segment in np.unique(segments[row["labels"] != -100]):
            piece = ids[(segments == segment) & (row["labels"] != -100)][None]
            alone = reference(piece).last_hidden_state
            np.testing.assert_allclose(hidden[0, segments == segment][: piece.shape[1]], alone[0], atol=1e-12)
            total += causal_lm_loss(reference.logits(alone), piece) * (piece.shape[1] - 1)
        packed = causal_lm_loss(reference.logits(hidden), row["labels"][None], segment_ids=segments[None])
        counted = int(((segments[1:] == segments[:-1]) & (row["labels"][1:] != -100)).sum())
        assert packed * counted == pytest.approx(total, rel=1e-12)
        losses.append(packed)
        counts.append(counted)
    assert sum(counts) > 0


def test_the_last_row_is_padded_or_left_out():
    rows = PackedDocuments([[2, 5, 6]], 5, end_token_id=None)
    assert rows[-1]["input_ids"].tolist() == [2, 5, 6, 1, 1]
    assert rows[0]["labels"].tolist() == [2, 5, 6, -100, -100]
    assert rows[0]["segment_ids"].tolist() == [0, 0, 0, 5, 5]
    assert len(PackedDocuments([[2, 5, 6, 7]], 3, end_token_id=None, drop_last=True)) == 1
    with pytest.raises(IndexError):
        rows[1]


def test_wrong_documents_are_all_named():
    with pytest.raises(InputError) as caught:
        PackedDocuments([[], [2, 5], [0.5], [[2]]], 1)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "length", "document 0", "document 2", "document 3",
    ]  # fmt: skip
    with pytest.raises(InputError, match="at least one"):
        PackedDocuments([], 5)


# -- order ------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64), st.integers(1, 5), st.integers(5, 31), st.integers(0, 40))
def test_any_step_is_the_same_whatever_was_read_before(seed, batch_size, count, step):
    fresh, used = (Batches(numbered(count), batch_size, seed=seed) for _ in range(2))
    for other in (0, 3 * step + 1, step // 2):
        used.at(other)
    assert fresh.at(step)["labels"].tolist() == used.at(step)["labels"].tolist()


def test_a_run_that_is_resumed_sees_the_batches_of_an_unbroken_one():
    unbroken = Batches(numbered(23), 3, seed=5).from_step(0)
    expected = [next(unbroken)["labels"].tolist() for _ in range(20)]
    for start in (1, 7, 13):
        resumed = Batches(numbered(23), 3, seed=5).from_step(start)
        assert [next(resumed)["labels"].tolist() for _ in range(20 - start)] == expected[start:]


def test_an_epoch_has_each_example_once_and_epochs_and_seeds_differ():
    batches = Batches(numbered(24), 3, seed=5)
    first, second = seen(batches, 0, 8), seen(batches, 8, 16)
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert first != list(range(24))
    assert first != seen(Batches(numbered(24), 3, seed=6), 0, 8)


def test_without_shuffling_the_order_is_that_of_the_examples():
    batches = Batches(numbered(11), 4, shuffle=False, drop_last=False)
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert len(Batches(numbered(11), 4)) == 2


def test_examples_left_out_of_one_epoch_come_in_another():
    batches = Batches(numbered(11), 4)
    assert set(seen(batches, 0, 2 * 9)) == set(range(11))


def test_the_order_is_the_published_stream_of_philox():
    """Fixed numbers: an order that changed with NumPy would end every run that is resumed."""
    assert permutation(7, 3, 0).tolist() == permutation(7, 3, 0).tolist()
    words = np.random.Philox(key=3, counter=[0, 0, 1, 2]).random_raw(7)
    assert permutation(7, 3, 2, 1).tolist() == sorted(range(7), key=lambda i: words[i])


# -- padding ----------------------------------------------------------------------------------------------------------


def of_lengths(*lengths: int) -> list[dict]:
    return [{"input_ids": list(range(10, 10 + length)), "labels": number} for number, length in enumerate(lengths)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 19), min_size=3, max_size=40), st.integers(1, 3), st.booleans(), st.integers(0, 5))
def test_padded_batches_hold_each_example_once_at_the_narrowest_width(lengths, batch_size, shuffle, epoch):
    batches = Batches(of_lengths(*lengths), batch_size, widths=(19, 5, 11), shuffle=shuffle, drop_last=False)
    found = []
    for step in range(epoch * len(batches), (epoch + 1) * len(batches)):
        batch = batches.at(step)
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            assert ids[mask == 1].tolist() == list(range(10, 10 + lengths[label]))
            assert (ids[mask == 0] == 1).all()
            assert (np.diff(mask) <= 0).all()
            found.append(int(label))
        longest = int(batch["attention_mask"].sum(1).max())
        assert batch["input_ids"].shape[1] == min(width for width in (5, 11, 19) if width >= longest)
    assert sorted(found) == list(range(len(lengths)))


def test_all_batches_but_the_last_are_full_and_the_steps_of_an_epoch_are_the_same_in_each():
    batches = Batches(of_lengths(*range(1, 20)), 4, widths=(5, 11, 19), drop_last=False)
    sizes = [len(batches.at(step)["labels"]) for step in range(3 * len(batches))]
    assert sizes.count(4) == 3 * 4
    assert sizes[4::5] == [3, 3, 3]


def test_examples_too_long_or_of_other_fields_are_all_named():
    examples = [*of_lengths(3, 12, 4, 13), {"input_ids": [1]}]
    with pytest.raises(InputError) as caught:
        Batches(examples, 2, widths=(5, 11))
    assert caught.value.problems == (
        "example 1: expected 1 to 11 tokens, got 12",
        "example 3: expected 1 to 11 tokens, got 13",
        "example 4: expected the fields ['input_ids', 'labels'], got ['input_ids']",
    )
    with pytest.raises(InputError, match="at least a batch of 4, got 3"):
        Batches(numbered(3), 4)
    with pytest.raises(InputError, match="batch_size: expected at least 1"):
        Batches(numbered(3), 0)


def test_rows_are_padded_on_the_right():
    batch = pad_rows(of_lengths(2, 3), 4)
    assert batch["input_ids"].tolist() == [[10, 11, 1, 1], [10, 11, 12, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [0, 1]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch_size": 3}, {"shuffle": False}, {"examples": numbered(9)[::-1]}]
)
def test_a_description_tells_runs_apart(change):
    usual = dict(examples=numbered(9), batch_size=2, seed=0, shuffle=True)
    assert Batches(**usual).describe() == Batches(**usual).describe()
    assert Batches(**usual).describe() != Batches(**{**usual, **change}).describe()
