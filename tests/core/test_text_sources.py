"""Texts, rows and questions: read as they are, and refused with file, line and field."""

import json

import pytest

from opt_core.errors import InputError
from opt_core.text_sources import Answer, read_questions, read_rows, read_texts

CONTEXT = "Where is Romeo? Romeo is in Verona."


def squad(answers=({"text": "Verona", "answer_start": 28},), **fields) -> dict:
    qa = {"id": "q1", "question": "Where?", "answers": list(answers), **fields}
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": [qa]}]}]}


def written(path, value) -> str:
    path.write_bytes((value if isinstance(value, str) else json.dumps(value)).encode())
    return str(path)


def problems_of(call, *arguments, **options) -> tuple[str, tuple[str, ...]]:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    return caught.value.title, caught.value.problems


def test_a_text_file_is_one_document_or_those_between_blank_lines(tmp_path):
    path = written(tmp_path / "a.txt", "one\ntwo\r\n\r\nthree\n\n\n\nfour é\n")
    assert read_texts(path) == ["one\ntwo\n\nthree\n\n\n\nfour é"]
    assert read_texts(path, at_blank_lines=True) == ["one\ntwo", "three", "four é"]


def test_csv_and_jsonl_and_rows_give_the_same(tmp_path):
    rows = [{"text": 'a "quoted",\nbroken line', "label": 3}, {"text": "b\u2028c", "label": 5}]
    csv_file = written(tmp_path / "a.csv", '\ufefftext,label\n"a ""quoted"",\nbroken line",3\nb\u2028c,5\n')
    json_file = written(tmp_path / "a.jsonl", "".join(f"{json.dumps(row)}\n\n" for row in rows))
    for source in (csv_file, json_file, rows):
        assert read_rows(source, {"text": str, "label": int}) == rows
        assert read_texts(source) == [row["text"] for row in rows]


def test_every_wrong_line_of_a_csv_file_is_named(tmp_path):
    path = written(tmp_path / "a.csv", "text,label\na,1\nb,many\nc\nd,1,2\n")
    title, problems = problems_of(read_rows, path, {"text": str, "label": int})
    assert title == path
    assert problems == (
        "line 3, field 'label': expected int, got 'many'",
        "line 4: expected 2 values, got 1",
        "line 5: expected 2 values, got 3",
    )


def test_every_wrong_line_of_a_jsonl_file_is_named(tmp_path):
    lines = ['{"text": "a"}', "[1]", '{"text": 5}', '{"text": "a", "text": "b"}', "{", '{"words": ""}']
    _, problems = problems_of(read_texts, written(tmp_path / "a.jsonl", "\n".join(lines)))
    assert [problem.partition(":")[0] for problem in problems] == [
        "line 2", "line 3, field 'text'", "line 4", "line 5", "line 6, field 'text'",
    ]  # fmt: skip
    assert "expected it, the row has 'words'" in problems[-1]
    assert "duplicate key 'text'" in problems[2]


@pytest.mark.parametrize("value", [True, 1.5, None, "1.5"])
def test_a_value_of_another_type_is_no_integer(value):
    assert "row 0, field 'label': expected int" in problems_of(read_rows, [{"label": value}], {"label": int})[1][0]


def test_whole_numbers_are_numbers():
    assert read_rows([{"x": 3}, {"x": "3.5"}], {"x": float}) == [{"x": 3.0}, {"x": 3.5}]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.pdf", b"", "expected a file of .txt, .csv, .jsonl, got .pdf"),
        ("a.txt", b"ab\xff", "expected UTF-8, got byte 0xff at 2"),
        ("a.csv", b"text\n", "expected at least one row, got none"),
        ("a.csv", b'text\n"a"b\n', "line 1: not CSV: ',' expected after '\"'"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    assert problems_of(read_texts, tmp_path / name) == (str(tmp_path / name), (problem,))


def test_a_text_has_no_fields(tmp_path):
    assert "named fields" in problems_of(read_rows, written(tmp_path / "a.txt", "a"), {"label": int})[1][0]


# -- questions --------------------------------------------------------------------------------------------------------


def test_a_file_and_a_dataset_give_the_same_questions(tmp_path):
    document = squad(({"text": "Verona", "answer_start": 28}, {"text": "in Verona", "answer_start": 25}))
    (question,) = read_questions(written(tmp_path / "a.json", document))
    assert question.answers == (Answer("Verona", 28), Answer("in Verona", 25))
    answers = {"text": ["Verona", "in Verona"], "answer_start": [28, 25]}
    assert read_questions([{"id": "q1", "question": "Where?", "context": CONTEXT, "answers": answers}]) == [question]


def test_an_impossible_question_has_no_answers_even_where_the_file_has_plausible_ones(tmp_path):
    document = squad((), is_impossible=True, plausible_answers=[{"text": "Romeo", "answer_start": 9}])
    assert read_questions(written(tmp_path / "a.json", document))[0].answers == ()


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (
            squad(({"text": "Verona", "answer_start": 27},)),
            "expected 'Verona' at 27 of the context, which has ' Veron'",
        ),
        (squad(({"text": "Verona", "answer_start": -7},)), "expected 'Verona' at -7"),
        (squad(({"text": "Verona"},)), "expected a text and a number answer_start, got 'Verona' and None"),
        (squad(()), "data[0].paragraphs[0].qas[0].answers: expected at least one, got none"),
        (squad(question=None), "data[0].paragraphs[0].qas[0].question: expected a text, got None"),
        ({"data": [{"paragraphs": 3}, 5]}, "data[0].paragraphs: expected a list, got int"),
        ({"data": [{"paragraphs": []}, 5]}, "data[1]: expected an object, got int"),
        ({"version": 1}, "data: expected a list, got NoneType"),
        ("{", "not JSON"),
    ],
)
def test_a_wrong_squad_file_names_the_place(tmp_path, document, problem):
    title, problems = problems_of(read_questions, written(tmp_path / "a.json", document))
    assert title == str(tmp_path / "a.json")
    assert problem in problems[0]


def test_ids_are_met_once(tmp_path):
    document = squad()
    document["data"] *= 2
    assert problems_of(read_questions, written(tmp_path / "a.json", document))[1] == (
        "id: expected each once, got 'q1' 2 times",
    )


def test_a_dataset_without_lists_of_answers_is_refused():
    row = {"id": "q", "question": "?", "context": "c", "answers": {"text": ["c"], "answer_start": []}}
    assert "row 0.answers" in problems_of(read_questions, [row])[1][0]


def test_the_datasets_package_gives_rows():
    datasets = pytest.importorskip("datasets")
    assert read_texts(datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 2]})) == ["a", "b"]
