"""`opt-zoo perplexity`: the published protocol, equal to the float64 reference and among backends."""

import json
import math

import numpy as np
import pytest
from harness import ROUNDOFF

from conversion import open_checkpoint
from opt_core import OPTTokenizer
from opt_core.reference import Reference, causal_lm_loss
from opt_zoo import perplexity
from opt_zoo.embedded import NAMES, embedded_folder
from opt_zoo.parity_cases import TEXTS
from opt_zoo.perplexity import cut_segments, mean_and_error

LENGTH = 23
TEXT = "\n\n".join(TEXTS)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8", newline="")
    return path


@pytest.fixture
def report_of(opt_zoo, text, backend):
    """The JSON of one backend."""

    def run(*arguments, source="opt-tiny") -> dict:
        code, out, err = opt_zoo("perplexity", source, text, *arguments, "--backend", backend.name, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


def reference_losses(name: str, length: int) -> list[float]:
    """By the definition: each segment alone, in float64, on the stored weights."""
    with open_checkpoint(embedded_folder(name)) as opened:
        reference = Reference(opened.config, {weight: opened.read(weight) for weight in opened.shapes})
    ids = OPTTokenizer.from_pretrained(embedded_folder(name))(TEXT)["input_ids"]
    assert ids[0] == 2
    segments = [np.array([ids[begin : begin + length]]) for begin in range(0, len(ids) - length + 1, length)]
    return [causal_lm_loss(reference.logits(reference(row).last_hidden_state), row) for row in segments]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_exp_of_the_mean_loss_of_the_reference(report_of, name):
    losses = reference_losses(name, LENGTH)
    report = report_of("--length", LENGTH, "--batch-size", 1, source=name)
    (result,) = report["results"]
    assert result["loss"] == pytest.approx(np.mean(losses), rel=64 * ROUNDOFF["float32"])
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=256 * ROUNDOFF["float32"])
    error = np.std(losses, ddof=1) / math.sqrt(len(losses))
    assert result["loss_standard_error"] == pytest.approx(error, rel=1e-4)
    assert result["perplexity_standard_error"] == pytest.approx(error * result["perplexity"])
    assert report["segments"] == len(losses)
    assert report["tokens"] == len(losses) * LENGTH + report["dropped_tokens"]
    assert 0 < report["dropped_tokens"] < LENGTH
    assert result["tokens_per_second"] > 0


def test_the_batch_size_changes_nothing(report_of):
    alone, together = (report_of("--length", LENGTH, "--batch-size", size)["results"][0] for size in (1, 3))
    assert together["loss"] == pytest.approx(alone["loss"], rel=64 * ROUNDOFF["float32"])


def test_half_precision_is_near_float32(report_of):
    exact, rounded = (report_of("--length", 47, "--dtype", dtype)["results"][0] for dtype in ("float32", "bfloat16"))
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=16 * ROUNDOFF["bfloat16"])
    assert rounded["loss"] != exact["loss"]


def test_the_table_has_all_backends_and_they_agree(opt_zoo, text, backends, monkeypatch):
    names = [backend.name for backend in backends]
    monkeypatch.setattr(perplexity, "installed_backends", lambda: names)
    code, out, _ = opt_zoo("perplexity", text, "--backend", "all", "--length", LENGTH)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if any(f" {name} " in line for name in names)]
    assert [row[1] for row in rows] == names
    values = [float(row[3]) for row in rows]
    assert values == pytest.approx([values[0]] * len(names), rel=256 * ROUNDOFF["float32"])
    assert f"segments of {LENGTH}" in out


def test_the_length_is_by_default_what_the_model_and_the_protocol_allow(opt_zoo, tmp_path, backend):
    (tmp_path / "long.txt").write_text(TEXT * 2)
    code, out, _ = opt_zoo("perplexity", tmp_path / "long.txt", "--backend", backend.name, "--json")
    report = json.loads(out)
    assert (code, report["length"], report["segments"]) == (0, 256, report["tokens"] // 256)
    (result,) = report["results"]
    assert result["loss_standard_error"] is None or report["segments"] > 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--length", 1], "--length: expected 2 to 256, the positions of the model, got 1"),
        (["--length", 257], "--length: expected 2 to 256"),
        (["--batch-size", 0], "--batch-size: expected 1 or more, got 0"),
        (["--length", 256], "expected at least --length = 256 tokens"),
    ],
)
def test_wrong_numbers_exit_with_2(opt_zoo, text, arguments, problem):
    text.write_text(TEXTS[0])
    code, out, err = opt_zoo("perplexity", text, "--backend", "torch", *arguments)
    assert (code, out) == (2, "")
    assert problem in err


def test_tables_and_broken_texts_are_refused(opt_zoo, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    for name, problem in (("a.jsonl", "plain text"), ("a.txt", "UTF-8"), ("none.txt", "none.txt")):
        code, _, err = opt_zoo("perplexity", tmp_path / name, "--backend", "torch")
        assert code == 2
        assert problem in err


def test_segments_have_all_tokens_but_the_remainder_once_and_in_order():
    assert cut_segments(np.arange(17), 5).tolist() == np.arange(15).reshape(3, 5).tolist()


def test_the_error_of_batches_is_weighted_by_their_segments():
    losses = [1.0, 2.0, 4.0]
    assert mean_and_error(losses, [1, 1, 1]) == pytest.approx((7 / 3, np.std(losses, ddof=1) / math.sqrt(3)))
    assert mean_and_error([1.0, 4.0], [3, 1])[0] == pytest.approx(1.75)
    assert mean_and_error([1.0], [5]) == (1.0, None)
