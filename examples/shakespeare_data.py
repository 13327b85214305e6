"""Small data sets from a few plays of Shakespeare's, as rows, or as files of the formats that users have.

    python examples/shakespeare_data.py FOLDER

writes verse_or_prose-{train,validation}.csv, the text of a speech and its label, and who_speaks-{train,validation}.json
in SQuAD's format; the same text gives the same files. The validation sets are the last tenth of Tiny Shakespeare, which
opt-tiny never saw in its training. data/shakespeare.txt is the last third of it, in the public domain: a speaker's name
and a colon stand before each speech, a blank line after it.
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

TEXT = Path(__file__).parent / "data" / "shakespeare.txt"
HELD_OUT = 111_539  # characters: the last tenth of Tiny Shakespeare
ORDER = ("first", "second", "third")


class Speech(NamedTuple):
    speaker: str
    lines: list[str]

    @property
    def text(self) -> str:
        return "\n".join([f"{self.speaker}:", *self.lines])


def parts_of_text() -> tuple[str, str]:
    """The text to train on, and the end of it, which is held out."""
    text = TEXT.read_text(encoding="utf-8")
    cut = text.index("\n\n", len(text) - HELD_OUT) + 2
    return text[:cut], text[cut:]


def speeches(text: str) -> list[Speech]:
    parts = (part.partition(":\n") for part in text.strip().split("\n\n"))
    return [Speech(name, lines.splitlines()) for name, colon, lines in parts if colon and lines]


def texts(text: str) -> Iterator[dict[str, str]]:
    """Speeches with their speakers."""
    return ({"text": speech.text} for speech in speeches(text))


def verse_or_prose(text: str) -> list[dict[str, str]]:
    """Speeches of several lines, joined, as many of one kind as of the other.

    A line of verse begins with a capital letter, which stays.
    """
    rows: dict[str, list[str]] = {"verse": [], "prose": []}
    for speech in speeches(text):
        small = [line[:1].islower() for line in speech.lines[1:]]
        if small and (all(small[:2]) or not any(small)):  # one line alone tells nothing, a mixture is neither
            rows["prose" if small[0] else "verse"].append(" ".join(speech.lines))
    count = min(map(len, rows.values()))
    return [{"text": text, "label": label} for label, texts in rows.items() for text in texts[:count]]


def who_speaks(text: str, at_once: int = 3, longest: int = 150) -> Iterator[dict[str, Any]]:
    """Dialogues of short speeches, and who speaks first, second, third: rows as those of the hub's `squad`.

    OPT sees at each token only what is to its left: a question has to be one that is answered by what came before.
    """
    spoken = speeches(text)
    for begin in range(0, len(spoken) - at_once + 1, at_once - 1):
        dialogue = spoken[begin : begin + at_once]
        if max(len(speech.text) for speech in dialogue) > longest:
            continue
        context, start = "\n\n".join(speech.text for speech in dialogue), 0
        for number, speech in enumerate(dialogue):
            answers = {"text": [speech.speaker], "answer_start": [start]}
            row = {"id": f"{begin}-{number}", "question": f"Who speaks {ORDER[number]}?"}
            yield {**row, "context": context, "answers": answers}
            start += len(speech.text) + 2


def squad_document(rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The same questions as the JSON of a SQuAD file, version 1.1."""
    paragraphs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        answers = [{"text": text, "answer_start": start}]
        qa = {"id": row["id"], "question": row["question"], "answers": answers}
        paragraphs.setdefault(row["context"], []).append(qa)
    listed = [{"context": context, "qas": qas} for context, qas in paragraphs.items()]
    return {"version": "1.1", "data": [{"title": "Shakespeare", "paragraphs": listed}]}


def write_data(folder: Path) -> None:
    """Writes the four files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, text in zip(("train", "validation"), parts_of_text(), strict=True):
        with open(folder / f"verse_or_prose-{part}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(verse_or_prose(text))
        document = json.dumps(squad_document(who_speaks(text)), indent=1)
        (folder / f"who_speaks-{part}.json").write_text(document + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
