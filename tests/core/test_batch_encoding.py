"""What a tokenizer call returns, as a mapping: by name, by attribute, and by row as published code has it."""

import pytest

from opt_core.batch_encoding import BatchEncoding


@pytest.mark.parametrize(
    ("ids", "row", "expected"),
    [([2, 5, 6], 0, [2, 5, 6]), ([[2, 5], [2, 7]], 1, [2, 7]), ([], 0, []), ([[], [2]], 0, [])],
)
def test_a_number_gives_the_ids_of_that_row_and_one_text_is_row_zero(ids, row, expected):
    assert BatchEncoding(input_ids=ids, attention_mask=ids)[row] == expected


def test_a_row_of_an_array_is_a_row():
    np = pytest.importorskip("numpy")
    assert BatchEncoding(input_ids=np.array([[2, 5, 6]]))[0].tolist() == [2, 5, 6]


def test_a_name_or_row_that_is_not_there_is_an_error():
    encoding = BatchEncoding(input_ids=[2, 5, 6])
    with pytest.raises(KeyError, match="labels"):
        encoding["labels"]
    with pytest.raises(AttributeError, match="has no entry 'labels'; it has input_ids"):
        _ = encoding.labels
    with pytest.raises(IndexError):
        encoding[1]


def test_a_row_is_not_one_of_the_names():
    encoding = BatchEncoding(input_ids=[2, 5, 6])
    assert list(encoding) == ["input_ids"]
    assert 0 not in encoding
