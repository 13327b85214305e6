"""Texts, labelled examples and questions from files, or from a Hugging Face dataset, checked as they are read.

Files: .txt; .csv with a line of names; .jsonl, an object in each line; SQuAD's .json, versions 1.1 and 2.0 (Rajpurkar
et al., arXiv:1606.05250 and arXiv:1806.03822). Anything else that gives dicts when iterated is taken as rows, which is
what a dataset of the `datasets` package does; that package is neither needed nor imported. All is read into memory.
Every problem is reported at once, with its file, line and field. Tokens are not made here.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_core.errors import InputError, raise_if
from opt_core.json_file import unique_keys

Source = str | Path | Iterable[Mapping[str, Any]]

SUFFIXES = (".txt", ".csv", ".jsonl")


@dataclass(frozen=True)
class Answer:
    """A stretch of a context: `context[start : start + len(text)] == text`."""

    text: str
    start: int  # in characters


@dataclass(frozen=True)
class Question:
    """A question about a context; without `answers` it cannot be answered from it (SQuAD 2.0)."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 file, with its own line ends.

    Raises:
        InputError: names the file and the first byte that is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(str(path), [f"expected UTF-8, got byte {byte:#04x} at {error.start}"]) from None


def read_texts(source: Source, field: str = "text", *, at_blank_lines: bool = False) -> list[str]:
    """One text for each document: a .txt file, or its parts between blank lines; `field` of every row of the others.

    Raises:
        InputError: lists the lines without such a field and those where it is no text; an unknown kind of file.
    """
    if _kind(source) == ".txt":
        text = read_text(source).replace("\r\n", "\n")  # type: ignore[arg-type]
        parts = text.split("\n\n") if at_blank_lines else [text]
        return [part.strip("\n") for part in parts if part.strip()]
    return [row[field] for row in read_rows(source, {field: str})]


def read_rows(source: Source, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The `fields`, name to type, of every row; a CSV file has only texts, which become numbers where those are wanted.

    Raises:
        InputError: lists every line that cannot be read, lacks a field, or has another type in it.
    """
    rows, problems = [], []
    for place, row in _rows(source):
        if isinstance(row, str):
            problems.append(f"{place}: {row}")
            continue
        values = {}
        for name, kind in fields.items():
            try:
                values[name] = _value(row, name, kind)
            except ValueError as error:
                problems.append(f"{place}, field {name!r}: {error}")
        rows.append(values)
    if not rows and not problems:
        problems.append("expected at least one row, got none")
    raise_if(InputError, _name(source), problems)
    return rows


def read_questions(source: Source) -> list[Question]:
    """The questions of a SQuAD file or of a dataset with the fields of `squad` and `squad_v2`, in their order.

    Raises:
        InputError: lists every place with a missing field, a wrong type, or an answer that the context does not have.
    """
    problems: list[str] = []
    entries = (
        _squad_entries(source, problems) if isinstance(source, (str, Path)) else _dataset_entries(source, problems)
    )
    questions = [question for place, entry in entries if (question := _question(place, entry, problems)) is not None]
    ids = [question.id for question in questions]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        problems.append(f"id: expected each once, got {twice!r} {ids.count(twice)} times")
    raise_if(InputError, _name(source), problems)
    return questions


# -- rows -------------------------------------------------------------------------------------------------------------


def _kind(source: Source) -> str | None:
    """The suffix of a file that is known; None for rows."""
    if not isinstance(source, (str, Path)):
        return None
    suffix = Path(source).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(str(source), [f"expected a file of {', '.join(SUFFIXES)}, got {suffix or 'no suffix'}"])
    return suffix


def _name(source: Source) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def _rows(source: Source) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """(where, row), or (where, what is wrong there)."""
    kind = _kind(source)
    if kind is None:
        for number, row in enumerate(source):  # type: ignore[arg-type]
            is_row = isinstance(row, Mapping)
            yield f"row {number}", row if is_row else f"expected a dict, got {type(row).__name__}"  # type: ignore[misc]
    elif kind == ".csv":
        yield from _csv_rows(read_text(source))  # type: ignore[arg-type]
    elif kind == ".jsonl":
        yield from _json_rows(read_text(source))  # type: ignore[arg-type]
    else:
        raise InputError(str(source), ["expected rows with named fields, from .csv or .jsonl; a text has none"])


def _csv_rows(text: str) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row or None in row.values():
                count = len(reader.fieldnames or ()) + len(row.get(None, ())) - list(row.values()).count(None)  # type: ignore[call-overload]
                yield place, f"expected {len(reader.fieldnames or ())} values, got {count}"
            else:
                yield place, row
    except csv.Error as error:
        yield f"line {reader.line_num}", f"not CSV: {error}"


def _json_rows(text: str) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            yield f"line {number}", f"not JSON: {error}"
            continue
        yield f"line {number}", row if isinstance(row, dict) else f"expected an object, got {type(row).__name__}"


def _value(row: Mapping[str, Any], name: str, kind: type) -> Any:
    """The value of a field; a ValueError says what is wrong with it."""
    if name not in row:
        raise ValueError(f"expected it, the row has {', '.join(map(repr, row)) or 'no fields'}")
    value = row[name]
    if kind in (int, float) and isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            pass
    is_number = kind is float and isinstance(value, int)
    if (isinstance(value, bool) and kind is not bool) or not (isinstance(value, kind) or is_number):
        raise ValueError(f"expected {kind.__name__}, got {value!r}")
    return kind(value)


# -- questions --------------------------------------------------------------------------------------------------------

Entry = tuple[str, Mapping[str, Any]]


def _squad_entries(path: str | Path, problems: list[str]) -> Iterator[Entry]:
    """(where, fields of a question with its context) of a file."""
    try:
        document = json.loads(read_text(path), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(path), [f"not JSON: {error}"]) from None
    for article_place, article in _objects(document, "", "data", problems):
        for place, paragraph in _objects(article, f"{article_place}.", "paragraphs", problems):
            for qa_place, qa in _objects(paragraph, f"{place}.", "qas", problems):
                answers = [answer for _, answer in _objects(qa, f"{qa_place}.", "answers", problems)]
                if qa.get("is_impossible") is True:
                    answers = []  # SQuAD 2.0 has `plausible_answers` beside it, which are wrong
                elif not answers and "is_impossible" not in qa:
                    problems.append(f"{qa_place}.answers: expected at least one, got none")
                yield qa_place, {**qa, "context": paragraph.get("context"), "answers": answers}


def _objects(holder: Any, place: str, name: str, problems: list[str]) -> Iterator[Entry]:
    """The objects of the list `name`, each with its place."""
    items = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(items, list):
        problems.append(f"{place}{name}: expected a list, got {type(items).__name__}")
        return
    for index, item in enumerate(items):
        if isinstance(item, dict):
            yield f"{place}{name}[{index}]", item
        else:
            problems.append(f"{place}{name}[{index}]: expected an object, got {type(item).__name__}")


def _dataset_entries(source: Iterable[Mapping[str, Any]], problems: list[str]) -> Iterator[Entry]:
    """Rows whose `answers` are {"text": [...], "answer_start": [...]}, as in the hub's `squad`."""
    for number, row in enumerate(source):
        answers = row.get("answers")
        try:
            pairs = zip(answers["text"], answers["answer_start"], strict=True)  # type: ignore[index]
            yield f"row {number}", {**row, "answers": [{"text": t, "answer_start": s} for t, s in pairs]}
        except (TypeError, KeyError, ValueError):
            problems.append(
                f"row {number}.answers: expected lists text and answer_start of one length, got {answers!r}"
            )


def _question(place: str, entry: Mapping[str, Any], problems: list[str]) -> Question | None:
    fields = {name: entry.get(name) for name in ("id", "question", "context")}
    wrong = [
        f"{place}.{name}: expected a text, got {value!r}" for name, value in fields.items() if type(value) is not str
    ]
    answers = []
    for index, answer in enumerate(entry["answers"]):
        text, start = answer.get("text"), answer.get("answer_start")
        where = f"{place}.answers[{index}]"
        if type(text) is not str or not text or isinstance(start, bool) or not hasattr(start, "__index__"):
            wrong.append(f"{where}: expected a text and a number answer_start, got {text!r} and {start!r}")
        elif not wrong and (start < 0 or fields["context"][start : start + len(text)] != text):  # type: ignore[index]
            found = fields["context"][max(start, 0) : max(start, 0) + len(text)]  # type: ignore[index]
            wrong.append(f"{where}: expected {text!r} at {start} of the context, which has {found!r}")
        else:
            answers.append(Answer(text, int(start)))  # type: ignore[call-overload]
    problems += wrong
    return None if wrong else Question(**fields, answers=tuple(answers))  # type: ignore[arg-type]
