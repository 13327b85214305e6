"""Windows, answers from logits, and the published measures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_core.errors import InputError
from opt_core.question_answering import (
    best_answer,
    exact_match,
    f1,
    make_windows,
    normalize_answer,
    squad_metrics,
    token_spans,
)
from opt_core.text_sources import Answer, Question

CONTEXT = (
    "The man turned on the faucet so the toilet filled with water, naïve café in Zürich 😀 你好 and what he said "
    "was there: the months of the year are 12 and the days 365, isn't it?"
)


def question_about(text: str | None, id_: str = "q") -> Question:
    answers = () if text is None else (Answer(text, CONTEXT.index(text)),)
    return Question(id_, "What is there?", CONTEXT, answers)


def one_hot_logits(window, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    eye = np.eye(len(window.input_ids))
    return eye[first], eye[last]


# -- windows ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_spans_are_the_offsets_of_the_tokenizers_library(tokenizer_of_texts, text):
    expected = tokenizer_of_texts._backend.encode(text, add_special_tokens=False).offsets
    spans = token_spans(text, tokenizer_of_texts)
    assert len(spans) == len(expected)
    for span, (begin, end) in zip(spans, expected, strict=True):
        assert span[0] <= begin <= end <= span[1]  # which may leave out the spaces at a token's ends
        assert text[span[0] : span[1]].strip() == text[begin:end].strip()


@pytest.fixture(scope="module")
def tokenizer_of_texts(vocab_folder):
    from opt_core import OPTTokenizer

    return OPTTokenizer.from_pretrained(vocab_folder)


def test_a_space_that_the_tokenizer_puts_before_a_text_belongs_to_no_character(vocab_folder):
    from opt_core import OPTTokenizer

    tokenizer = OPTTokenizer.from_pretrained(vocab_folder, add_prefix_space=True)
    spans = token_spans("water é", tokenizer)
    assert spans[0][0] == 0
    assert spans[-1][1] == len("water é")


def test_a_window_is_the_question_and_a_part_of_the_context_as_the_tokenizer_joins_them(tokenizer):
    (window,) = make_windows([question_about("water")], tokenizer, length=500)
    assert window.input_ids == tokenizer("What is there?", CONTEXT)["input_ids"]


@pytest.mark.parametrize("stride", [0, 5])
def test_windows_cover_the_context_and_overlap_by_the_stride(tokenizer, stride):
    windows = make_windows([question_about("water")], tokenizer, length=23, stride=stride)
    ids = tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    joined = windows[0].input_ids[windows[0].context_begin :]
    for window in windows[1:]:
        part = window.input_ids[window.context_begin :]
        assert joined[len(joined) - stride :] == part[:stride]
        joined += part[stride:]
    assert joined == ids
    assert len(windows) > 2
    assert max(len(window.input_ids) for window in windows) == 23


@pytest.mark.parametrize("text", ["The", "water", "café in Zürich 😀", "你好", "好", "365", "it?"])
def test_positions_are_those_of_the_answer_where_a_window_holds_it(tokenizer, text):
    windows = make_windows([question_about(text)], tokenizer, length=59, stride=20)
    held = [window for window in windows if window.end_position]
    assert held
    for window in held:
        begin, end = (window.spans[p - window.context_begin] for p in (window.start_position, window.end_position))
        assert text in CONTEXT[begin[0] : end[1]]
        assert CONTEXT[begin[0] : end[1]].strip(" ,?") == text.strip(" ,?")
    for window in windows:
        whole = CONTEXT[window.spans[0][0] : window.spans[-1][1]]
        assert bool(window.end_position) == (text in whole)


def test_a_question_without_an_answer_points_at_the_first_token(tokenizer):
    for window in make_windows([question_about(None)], tokenizer, length=37, stride=5):
        assert (window.example()["start_positions"], window.example()["end_positions"]) == (0, 0)


def test_questions_that_leave_no_room_are_all_named(tokenizer):
    with pytest.raises(InputError) as caught:
        make_windows([question_about("water", "a"), question_about("water", "b")], tokenizer, length=17, stride=11)
    assert [problem[:1] for problem in caught.value.problems] == ["a", "b"]


# -- from logits to text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["water", "café in Zürich", "365"])
def test_logits_at_the_answer_give_the_answer_whatever_the_windows(tokenizer, text):
    for length in (59, 500):
        windows = make_windows([question_about(text)], tokenizer, length=length, stride=20)
        logits = [one_hot_logits(w, w.start_position, w.end_position) for w in windows]
        pairs = [(w, s * (w.end_position > 0), e) for w, (s, e) in zip(windows, logits, strict=True)]
        assert best_answer(CONTEXT, [(w, s, e) for w, s, e in pairs]).text.strip(",") == text


def test_padding_and_question_and_reversed_pairs_are_never_chosen(tokenizer):
    (window,) = make_windows([question_about("water")], tokenizer, length=500)
    T = len(window.input_ids) + 3  # padded
    start_T, end_T = np.zeros(T), np.zeros(T)
    start_T[[1, T - 1]] = end_T[[2, T - 1]] = 9.0
    begin = window.context_begin
    start_T[begin + 5], end_T[begin + 2], end_T[begin + 7] = 4.0, 5.0, 3.0
    prediction = best_answer(CONTEXT, [(window, start_T, end_T)])
    assert prediction.score == 7.0
    assert prediction.text == CONTEXT[window.spans[5][0] : window.spans[7][1]].strip()
    assert best_answer(CONTEXT, [(window, start_T, end_T)], longest=2).score < 7.0


def test_no_answer_where_the_first_token_scores_higher_than_the_threshold(tokenizer):
    (window,) = make_windows([question_about("water")], tokenizer, length=500)
    start_T, end_T = np.zeros((2, len(window.input_ids)))
    start_T[window.start_position] = 2.0
    start_T[0] = 3.0
    windows = [(window, start_T, end_T)]
    assert best_answer(CONTEXT, windows).text != ""
    assert best_answer(CONTEXT, windows, may_be_unanswerable=True).text == ""
    assert best_answer(CONTEXT, windows, may_be_unanswerable=True, null_threshold=1.0).text != ""


# -- measures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "truth", "exact", "overlap"),
    [
        ("The Globe,  a theatre!", "globe theatre", 1, 1),
        ("Globe", "the Globe theatre", 0, 2 / 3),
        ("Globe Globe", "Globe", 0, 2 / 3),
        ("Theatre", "Globe", 0, 0),
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("", "Globe", 0, 0),
        ("anthem", "them", 0, 0),
        ("U.S.", "us", 1, 1),
    ],
)
def test_measures_are_those_of_the_published_script(predicted, truth, exact, overlap):
    assert exact_match(predicted, truth) == exact
    assert f1(predicted, truth) == pytest.approx(overlap)
    assert f1(truth, predicted) == pytest.approx(overlap)


def test_an_answer_is_normalised_as_published():
    assert normalize_answer("  The “Answer”: an apple-pie, a day\n") == "“answer” applepie day"


def test_metrics_take_the_best_of_several_answers_and_no_answer_where_there_is_none():
    questions = [
        Question("a", "?", "x y z", (Answer("x", 0), Answer("y z", 2))),
        Question("b", "?", "x y z", ()),
        Question("c", "?", "x y z", (Answer("x y", 0),)),
    ]
    metrics = squad_metrics(questions, {"a": "y z", "b": "", "c": "x"})
    assert metrics == pytest.approx({"exact_match": 200 / 3, "f1": 100 * (1 + 1 + 2 / 3) / 3})
    with pytest.raises(InputError, match="b: expected a prediction, got none"):
        squad_metrics(questions[:2], {"a": "x"})
