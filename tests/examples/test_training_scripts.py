"""The training scripts of `examples/`: each in every backend, a killed run that goes on, and the data they make."""

import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import run_processes

from opt_core import OPTConfig, OPTTokenizer
from opt_core.text_sources import read_questions, read_rows
from opt_zoo.embedded import embedded_folder
from opt_zoo.training_log import LOG

EXAMPLES = Path(__file__).parents[2] / "examples"
TASKS = {
    "causal_lm": "causal-lm",
    "lora": "causal-lm",
    "classifier": "sequence-classification",
    "question_answering": "question-answering",
}
SHORT = ["--steps", "2", "--every", "1", "--batch-size", "2"]


@pytest.fixture
def data(monkeypatch):
    """The module that makes the data sets."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import shakespeare_data

    return shakespeare_data


@pytest.fixture
def files(data, tmp_path) -> dict[str, list[str]]:
    """A little of the data, as files, in arguments of each script."""
    data.write_data(tmp_path / "all")
    texts = [row["text"] for row in data.texts(data.parts_of_text()[1])]
    written = {}
    for part, begin in (("train", 0), ("validation", 5)):
        (tmp_path / f"{part}.txt").write_text("\n\n".join(texts[begin : begin + 5]))
        rows = read_rows(tmp_path / "all" / f"verse_or_prose-{part}.csv", {"text": str, "label": str})
        lines = [json.dumps(row) + "\n" for row in (*rows[:2], *rows[-2:])]
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
        document = json.loads((tmp_path / "all" / f"who_speaks-{part}.json").read_text())
        document["data"][0]["paragraphs"] = document["data"][0]["paragraphs"][:2]
        (tmp_path / f"{part}.json").write_text(json.dumps(document))
    kinds = {"causal_lm": "txt", "lora": "txt", "classifier": "jsonl", "question_answering": "json"}
    for name, kind in kinds.items():
        written[name] = [f"--{part}={tmp_path / f'{part}.{kind}'}" for part in ("train", "validation")]
    written["causal_lm"] += ["--length", "61"]
    written["lora"] += ["--length", "61", "--rank", "3"]
    written["classifier"] += ["--widths", "31"]
    written["question_answering"] += ["--length", "96", "--stride", "11"]
    return written


@pytest.fixture
def first_backend(backends):
    """One is enough where the script is at stake; the others are slow to compile."""
    return backends[0]


@pytest.fixture
def script(data, monkeypatch, capsys):
    """Runs a script in this process; returns its last line."""

    def run(name: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [f"train_{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"train_{name}.py"), run_name="__main__")
        return capsys.readouterr().out.strip().splitlines()[-1]

    return run


@pytest.mark.parametrize("name", TASKS)
def test_a_script_trains_validates_and_leaves_a_model_that_loads(first_backend, name, script, files, tmp_path):
    check_script(first_backend, name, script, files, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_script_does_so_in_every_backend(backend, name, script, files, tmp_path):
    check_script(backend, name, script, files, tmp_path)


def check_script(backend, name, script, files, tmp_path):
    folder = tmp_path / "run"
    last = script(name, "--backend", backend.name, "--folder", folder, *SHORT, *files[name])
    assert last.endswith(" in 2 steps.")
    assert "validation" in last
    model = backend.model_class(TASKS[name]).from_pretrained(folder / "model")
    ids = OPTTokenizer.from_pretrained(folder / "model")("To be", return_tensors="np")["input_ids"]
    out = model(ids)
    assert np.isfinite(backend.numpy(out.start_logits if name == "question_answering" else out.logits)).all()
    assert {path.name for path in folder.iterdir()} >= {"log.jsonl", "training.png", "step-000002", "model"}
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == [0, 1, 2]
    if name == "lora":
        assert (folder / "adapter" / "adapter_config.json").exists()
        assert not (folder / "step-000002" / "model.safetensors").exists()
    if name == "classifier":
        assert model.config.id2label == {0: "prose", 1: "verse"}


def losses_of(folder: Path) -> list[float]:
    log = folder / LOG
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("}") and '"loss"' in line]


def test_a_killed_script_goes_on_with_the_losses_of_an_unbroken_one(first_backend, files, tmp_path):
    check_killed(first_backend, files, tmp_path)


@pytest.mark.slow
def test_a_killed_script_does_so_in_every_backend(backend, files, tmp_path):
    check_killed(backend, files, tmp_path)


def check_killed(backend, files, tmp_path):
    command = [sys.executable, EXAMPLES / "train_causal_lm.py", "--backend", backend.name, *files["causal_lm"]]
    command += ["--from", "opt-tiny", "--steps", "7", "--every", "2", "--batch-size", "2"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    run = lambda folder: [*map(str, command), "--folder", str(folder)]  # noqa: E731
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    process = subprocess.Popen(run(killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(losses_of(killed)) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for folder in (killed, unbroken):
        done = subprocess.run(run(folder), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("going on after step 2" in done.stderr) == (folder == killed), done.stderr
    assert len(losses_of(killed)) == 7
    assert losses_of(killed) == losses_of(unbroken)


@pytest.mark.slow
def test_a_script_trains_over_two_processes_as_in_one(files, tmp_path):
    """Along `tensor`, where dropout is the same; then it goes on along `fsdp`."""
    arguments = ["--backend", "torch", *files["causal_lm"], "--from", "opt-tiny", "--batch-size", "2", "--every", "2"]
    over_two, alone = ([*arguments, "--folder", tmp_path / name] for name in ("two", "one"))
    script = EXAMPLES / "train_causal_lm.py"
    first, second = run_processes(script, 2, *over_two, "--steps", "4", "--mesh", "tensor=2", timeout=300)
    assert first.stdout.strip().endswith(" in 4 steps.")
    assert "step 4: perplexity" in first.stderr
    assert (second.stdout, second.stderr) == ("", "")
    run_processes(script, 1, *alone, "--steps", "4", timeout=300)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    again = run_processes(script, 2, *over_two, "--steps", "4", "--mesh", "fsdp=2", timeout=300)
    assert "going on after step 4" in again[0].stderr


def test_a_folder_of_another_run_is_refused(first_backend, script, files, tmp_path):
    arguments = ["--backend", first_backend.name, "--folder", tmp_path / "run", *SHORT, *files["causal_lm"]]
    script("causal_lm", *arguments)
    with pytest.raises(ValueError, match=r"recipe\.learning_rate: this run has 0\.5, the one in the folder 0\.002"):
        script("causal_lm", *arguments, "--rate", 0.5)


def test_half_of_the_files_is_refused(script, files, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script("classifier", "--backend", "torch", files["classifier"][0])
    assert "expected --train and --validation, or neither" in capsys.readouterr().err


# -- the data ---------------------------------------------------------------------------------------------------------


def test_the_files_and_the_rows_are_the_same_data(data, tmp_path):
    data.write_data(tmp_path)
    for part, text in zip(("train", "validation"), data.parts_of_text(), strict=True):
        rows = read_rows(tmp_path / f"verse_or_prose-{part}.csv", {"text": str, "label": str})
        assert rows == data.verse_or_prose(text)
        assert read_questions(tmp_path / f"who_speaks-{part}.json") == read_questions(data.who_speaks(text))


def test_training_and_validation_share_no_text(data):
    train, validation = data.parts_of_text()
    assert train + validation == data.TEXT.read_text()
    assert len(validation) == pytest.approx(data.HELD_OUT, abs=1000)
    for rows in (data.texts, data.verse_or_prose):
        shared = {row["text"] for row in rows(train)} & {row["text"] for row in rows(validation)}
        assert all(len(text) < 60 for text in shared)  # "Ay, my good lord."


def test_there_are_as_many_verses_as_prose_and_all_orders_of_speakers(data):
    for text in data.parts_of_text():
        labels = [row["label"] for row in data.verse_or_prose(text)]
        assert labels.count("verse") == labels.count("prose") > 80
        questions = read_questions(data.who_speaks(text))
        asked = [question.question for question in questions]
        assert {asked.count(f"Who speaks {which}?") for which in data.ORDER} == {len(asked) // 3}
        for question in questions:
            speakers = [part.partition(":\n")[0] for part in question.context.split("\n\n")]
            number = data.ORDER.index(question.question.removeprefix("Who speaks ").rstrip("?"))
            assert question.answers[0].text == speakers[number]


# -- what they reach --------------------------------------------------------------------------------------------------

REACHED = {"causal_lm": ("perplexity", 150), "classifier": ("accuracy", 0.7), "lora": ("perplexity", 80)}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TASKS)
def test_a_script_reaches_what_it_is_for(backend, name, script, tmp_path):
    script(name, "--backend", backend.name, "--folder", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    metrics = [line["validation"] for line in lines if "validation" in line]
    before, after = metrics[0], metrics[-1]
    if name == "question_answering":
        assert before["exact_match"] < 5
        assert after["exact_match"] > 40
        return
    metric, bound = REACHED[name]
    assert (
        (after[metric] > bound > before[metric]) if metric == "accuracy" else (after[metric] < bound < before[metric])
    )
    assert math.isfinite(after[metric])


def test_the_embedded_checkpoint_fits_the_rows_of_the_scripts():
    assert OPTConfig.from_json(embedded_folder()).max_position_embeddings == 256  # the default --length
