"""Errors that collect: every problem, one per line, and the same type after a trip to another process."""

import pickle

import pytest

from opt_core.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    KeywordError,
    MissingFrameworkError,
    ProblemsError,
    raise_if,
)


def test_one_problem_stands_on_the_line_of_the_title():
    assert str(ConfigError("config.json", ["ffn_dim: expected 3, got 5"])) == "config.json: ffn_dim: expected 3, got 5"


def test_several_problems_are_counted_and_listed():
    error = CheckpointError("folder", ["a: missing", "b: unexpected"])
    assert str(error) == "folder: 2 problems\n  - a: missing\n  - b: unexpected"
    assert error.problems == ("a: missing", "b: unexpected")
    assert error.title == "folder"


def test_of_very_many_problems_the_message_has_the_first_and_their_number():
    error = CheckpointError("folder", (f"{number}: missing" for number in range(5003)))
    lines = str(error).splitlines()
    assert lines[0] == "folder: 5003 problems"
    assert lines[-2:] == ["  - 999: missing", "  - and 4003 more"]
    assert len(error.problems) == 5003


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_quoted_neither_acts_on_a_terminal_nor_fills_it(count):
    text = str(CheckpointError("folder", ["\x1b[2J\ud800\n\u202ename: " + "x" * 10**6] * count))
    assert text.isprintable() or count == 2
    assert "\\x1b[2J\\ud800\\n\\u202ename: xxx" in text
    assert len(text) < 10_100 * count


@pytest.mark.parametrize("kind", [ConfigError, CheckpointError, InputError, KeywordError])
def test_every_kind_is_a_value_error_and_survives_pickling(kind):
    error = kind("title", ["x: one", "y: two"])
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(error, ValueError)
    assert (type(again), str(again), again.problems) == (kind, str(error), error.problems)


def test_a_wrong_keyword_is_a_type_error_too_and_a_missing_framework_an_import_error():
    assert issubclass(KeywordError, TypeError)
    assert issubclass(KeywordError, InputError)
    assert issubclass(MissingFrameworkError, ImportError)


def test_nothing_is_raised_without_problems():
    raise_if(ProblemsError, "title", iter(()))


def test_problems_may_come_from_a_generator():
    with pytest.raises(ConfigError, match="title: 2 problems"):
        raise_if(ConfigError, "title", (f"{name}: wrong" for name in "ab"))
