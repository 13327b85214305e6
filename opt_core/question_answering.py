"""Extractive question answering: windows over long contexts, the answer from logits, and the published measures.

A window is `</s> question </s> part of the context`, which is what `OPTTokenizer(question, context)` gives; windows of
one context overlap by `stride` tokens. Where a window does not hold the answer, both positions are 0, its first `</s>`:
so in SQuAD 2.0's published scripts. OPT attends to the left alone, hence the logits at 0 are the same for every
question: a threshold that is learned, nothing more. The measures are those of the official script, evaluate-v2.0.py
(worksheets.codalab.org/worksheets/0xd53d03a48ef64b329c16b9baf0f99b0c), of which version 1.1's are a special case.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from opt_core.errors import InputError, raise_if
from opt_core.text_sources import Question
from opt_core.tokenizer import OPTTokenizer

MOST_CANDIDATES = 20  # of starts and of ends, as in the published scripts


class Window(NamedTuple):
    """A question with a part of its context, as token ids."""

    question: int  # its number
    input_ids: list[int]
    context_begin: int  # the place of the first context token; the others follow
    spans: list[tuple[int, int]]  # of each context token: the characters it stands for, [begin, end)
    start_position: int  # of the first and the last token of the answer; 0 where the window does not hold it
    end_position: int

    def example(self) -> dict[str, Any]:
        """The fields that a model trains on."""
        return {
            "input_ids": self.input_ids,
            "start_positions": self.start_position,
            "end_positions": self.end_position,
        }


def make_windows(
    questions: Sequence[Question], tokenizer: OPTTokenizer, length: int = 384, stride: int = 128
) -> list[Window]:
    """The windows of all questions, in order, of at most `length` tokens; the first answer is the one to learn.

    Raises:
        InputError: lists the questions that leave no room for more than `stride` tokens of the context.
    """
    windows, problems = [], []
    for number, question in enumerate(questions):
        asked_ids = tokenizer(question.question, add_special_tokens=False)["input_ids"]
        spans = token_spans(question.context, tokenizer)
        context_ids = tokenizer(question.context, add_special_tokens=False)["input_ids"]
        prefix = tokenizer.build_inputs_with_special_tokens(asked_ids, [])
        room = length - len(prefix)
        if room <= stride:
            tokens = f"{len(prefix)} tokens leave {room} of {length} for the context"
            problems.append(f"{question.id}: expected a shorter question, its {tokens}, the stride is {stride}")
            continue
        begin = 0
        while True:
            part = slice(begin, begin + room)
            first, last = _answer_positions(question, spans[part], len(prefix))
            windows.append(Window(number, prefix + context_ids[part], len(prefix), spans[part], first, last))
            if begin + room >= len(context_ids):
                break
            begin += room - stride
    raise_if(InputError, "make_windows", problems)
    return windows


def token_spans(text: str, tokenizer: OPTTokenizer) -> list[tuple[int, int]]:
    """For each token of a text the characters [begin, end) of which it has bytes.

    A token of byte-level BPE has a letter for each byte; a character of several bytes may belong to several tokens.
    """
    sizes = [len(token) for token in tokenizer.tokenize(text)]
    char_of_byte = np.repeat(np.arange(len(text)), [len(char.encode()) for char in text])
    prefix = sum(sizes) - len(char_of_byte)  # a space that the tokenizer put before the text
    assert 0 <= prefix <= 1, "expected byte-level tokens"
    ends = np.cumsum(sizes) - prefix
    begins = np.maximum(ends - sizes, 0)
    return [
        (int(char_of_byte[begin]), int(char_of_byte[end - 1]) + 1) if end > begin else (0, 0)
        for begin, end in zip(begins, ends, strict=True)
    ]


def _answer_positions(question: Question, spans: list[tuple[int, int]], begin: int) -> tuple[int, int]:
    """Of the first and the last token of the answer in a window; (0, 0) where it does not hold all of it."""
    if not question.answers or not spans:
        return 0, 0
    start, end = question.answers[0].start, question.answers[0].start + len(question.answers[0].text)
    if start < spans[0][0] or end > spans[-1][1]:
        return 0, 0
    first = next(i for i, span in enumerate(spans) if span[1] > start)
    last = max(i for i, span in enumerate(spans) if span[0] < end)
    return begin + first, begin + last


# -- from logits to text ----------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """The best stretch of a context; "" where no answer scored higher."""

    text: str
    score: float  # start logit + end logit
    null_score: float  # of no answer: the lowest of the windows, as in the published scripts


def best_answer(
    context: str,
    windows: Iterable[tuple[Window, np.ndarray, np.ndarray]],
    *,
    longest: int = 30,
    may_be_unanswerable: bool = False,
    null_threshold: float = 0.0,
) -> Prediction:
    """The answer to one question from all its windows, each with its logits [T] of starts and of ends.

    Among the 20 best starts and ends of a window, the pair with the largest sum, of at most `longest` tokens.
    """
    best, null = ("", -np.inf), np.inf
    for window, start_T, end_T in windows:
        null = min(null, float(start_T[0] + end_T[0]))
        begin, count = window.context_begin, len(window.spans)
        starts_C, ends_C = (np.asarray(x_T, np.float64)[begin : begin + count] for x_T in (start_T, end_T))
        for first in np.argsort(-starts_C, kind="stable")[:MOST_CANDIDATES]:
            for last in np.argsort(-ends_C, kind="stable")[:MOST_CANDIDATES]:
                score = float(starts_C[first] + ends_C[last])
                if first <= last < first + longest and score > best[1]:
                    text = context[window.spans[first][0] : window.spans[last][1]].strip()
                    best = (text, score) if text else best
    answered = not may_be_unanswerable or null - best[1] <= null_threshold
    return Prediction(best[0] if answered else "", best[1], null)


# -- measures ---------------------------------------------------------------------------------------------------------


def normalize_answer(text: str) -> str:
    """Lower case without punctuation, the articles a, an, the, and runs of white space."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(predicted: str, truth: str) -> float:
    return float(normalize_answer(predicted) == normalize_answer(truth))


def f1(predicted: str, truth: str) -> float:
    """The harmonic mean of precision and recall of the words; where one of the two is empty, whether both are."""
    got, wanted = normalize_answer(predicted).split(), normalize_answer(truth).split()
    if not got or not wanted:
        return float(got == wanted)
    shared = sum((Counter(got) & Counter(wanted)).values())
    return 2 * shared / (len(got) + len(wanted)) if shared else 0.0


def squad_metrics(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
    """`exact_match` and `f1` in percent: for each question the best over its answers, "" for one without.

    Raises:
        InputError: lists the questions without a prediction.
    """
    missing = [
        f"{question.id}: expected a prediction, got none" for question in questions if question.id not in predictions
    ]
    raise_if(InputError, "squad_metrics", missing)
    totals = {"exact_match": 0.0, "f1": 0.0}
    for question in questions:
        truths = [answer.text for answer in question.answers if normalize_answer(answer.text)] or [""]
        for name, measure in (("exact_match", exact_match), ("f1", f1)):
            totals[name] += max(measure(predictions[question.id], truth) for truth in truths)
    return {name: 100 * total / len(questions) for name, total in totals.items()}
