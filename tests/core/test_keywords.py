"""Keywords of a call: misspelt ones, and those of the published classes."""

import pytest

from opt_core.errors import InputError, KeywordError
from opt_core.keywords import CALLING, GENERATING, LOADING, SAVING, arguments_of, check_keywords, only_one


def test_a_misspelt_keyword_is_told_what_it_may_have_meant():
    with pytest.raises(KeywordError) as caught:
        check_keywords({"atention_mask": 1, "xyz": 2, "input_ids": 3}, ["input_ids", "attention_mask"], {})
    assert caught.value.problems == (
        "atention_mask: unknown keyword; did you mean attention_mask?",
        "xyz: unknown keyword",
    )
    check_keywords({}, ["input_ids"], {})


def test_known_keywords_may_come_from_a_generator():
    with pytest.raises(KeywordError) as caught:
        check_keywords({"input_idz": 1, "labelz": 2}, (name for name in ("input_ids", "labels")), {})
    assert [line.rpartition(" ")[2] for line in caught.value.problems] == ["input_ids?", "labels?"]


@pytest.mark.parametrize("table", [LOADING, SAVING, CALLING, GENERATING])
def test_a_published_argument_is_taken_where_it_asks_for_nothing_and_else_told_what_to_write(table):
    for name, row in table.items():
        for value in row.taken:
            check_keywords({name: value}, [], table)
        with pytest.raises(KeywordError) as caught:
            check_keywords({name: "another value"}, [], table)
        assert caught.value.problems[0].startswith(f"{name}: expected ")
        assert caught.value.problems[0].endswith(f", got 'another value'; {row.instead}")


def test_a_number_is_no_switch_and_a_long_value_is_not_printed():
    with pytest.raises(KeywordError, match="return_dict: expected None or True, got 1; "):
        check_keywords({"return_dict": 1}, [], CALLING)
    with pytest.raises(KeywordError, match="params: expected None, got dict; "):
        check_keywords({"params": dict.fromkeys(range(1000))}, [], CALLING)


def test_the_arguments_of_a_function_are_those_a_caller_may_name():
    def call(self, input_ids, *, labels=None, **unknown): ...

    assert arguments_of(call) == ("input_ids", "labels")


def test_positional_leftovers_are_no_keywords():
    def call(input_ids, *rest, labels=None): ...

    assert arguments_of(call) == ("input_ids", "labels")


def test_of_arguments_that_exclude_each_other_one_may_be_given():
    assert only_one("call", dtype=None, torch_dtype="float16") == "float16"
    assert only_one("call", dtype=None, torch_dtype=None) is None
    with pytest.raises(InputError, match="call: dtype, torch_dtype: expected one of them, got 2"):
        only_one("call", dtype="float32", torch_dtype="float16", device=None)
