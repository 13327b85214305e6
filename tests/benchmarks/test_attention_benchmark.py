"""Eager against fused attention, the benchmark: no cell is left out in silence, tables say what was measured."""

import argparse
import json
import subprocess
import sys
import time

import pytest

from benchmarks import attention, attention_worker
from benchmarks.attention import Cell, estimate, implementations, keep_earlier, make_cells, refusal, run_cell
from benchmarks.attention_report import to_markdown
from benchmarks.attention_worker import Job, in_turn
from opt_core import OPTConfig
from opt_zoo.bench.turns import WorkerError

CONFIG = OPTConfig.preset("opt-125m")
CEILINGS = {"bytes_per_second": 2e10, "flops_per_second": 2e11}
CELL = Cell("training", "torch", "float32", 8, 2048)


def options(**changes) -> argparse.Namespace:
    usual = dict(
        parts=["training"], contestants=["torch", "transformers"], dtypes=["float32"], batches=[1, 2],
        lengths=[128, 256], runs=3, seconds=5.0, max_seconds=1e6, max_memory=1e6, new_tokens=7, device="cpu",
    )  # fmt: skip
    return argparse.Namespace(**{**usual, **changes})


def document(*rows) -> dict:
    return {
        "size": "opt-125m", "heads": 12, "head_size": 64, "fused": "sdpa", "device": "cpu", "gpu": None, "peers": {},
        "available_processors": 2, "processor": "p", "versions": {"torch": "2"}, "commit": "c", "date": "d",
        "command": "python benchmarks/attention.py", "results": list(rows),
    }  # fmt: skip


def row(status: str = "ok", reason: str = "", **results) -> dict:
    return {**CELL._asdict(), "status": status, "reason": reason, "results": results}


@pytest.mark.parametrize(
    ("changes", "left", "why"),
    [
        ({"max_memory": 1.0}, 1e9, "1.0 GB allowed"),
        ({"max_seconds": 60}, 1e9, "60 s allowed"),
        ({}, 60.0, "60 s were left"),
    ],
)
def test_a_cell_that_is_too_large_says_what_it_would_need(changes, left, why):
    result = run_cell(CELL, options(**changes), CONFIG, CEILINGS, left, "")
    need = estimate(CELL, implementations(CELL), options(), CONFIG, CEILINGS)
    assert result["status"] == "not run"
    assert result["reason"] == f"would need about {need.nbytes / 1e9:.1f} GB and {need.seconds:.0f} s; {why}"
    assert result["reason"] in to_markdown(document(result))


def test_a_backend_that_is_not_installed_is_not_run(monkeypatch):
    monkeypatch.setattr(attention, "installed_backends", lambda: ("flax",))
    assert run_cell(CELL, options(), CONFIG, CEILINGS, 1e9, "")["reason"] == "torch is not installed"


def test_a_prompt_leaves_room_for_the_new_tokens():
    cell = CELL._replace(part="inference")
    need = estimate(cell, implementations(cell), options(), CONFIG, CEILINGS)
    assert "2055 tokens" in refusal(cell, need, options(), CONFIG, 1e9)


def test_fused_attention_is_measured_alone_where_eager_does_not_fit(monkeypatch):
    asked = []

    def answer(module, arguments, *rest):
        asked.append(json.loads(arguments[0]))
        return {"sdpa": {"step_seconds": 2.0, "step_bytes": 6_000_000}}

    monkeypatch.setattr(attention, "run_process", answer)
    whole, fused = (
        estimate(CELL, names, options(), CONFIG, CEILINGS).nbytes / 1e9 for names in (implementations(CELL), ("sdpa",))
    )
    result = run_cell(CELL, options(max_memory=(whole + fused) / 2), CONFIG, CEILINGS, 1e9, "")
    assert fused < whole
    assert asked[0][7] == ["sdpa"]
    assert attention.failures(result) == []
    text = to_markdown(document(result))
    assert "| 8 | 2048 |  | 2.000 |  |  | 6 |" in text
    assert f"eager not_run: would need about {whole:.1f} GB" in text


def test_complete_cells_of_an_earlier_document_are_kept(tmp_path):
    figures = {"step_seconds": 2.0, "step_bytes": 6_000_000}
    whole = row(eager=figures, sdpa=figures)
    partial = {**row(eager={"not_run": "too large"}, sdpa=figures), "batch": 4}
    refused = {**row("not run", "too large"), "batch": 2}
    now = {**document(), "schema": attention.SCHEMA, "new_tokens": 33, "commit": "new"}
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps({**now, "commit": "old", "results": [whole, partial, refused]}))
    assert keep_earlier(path, now) == {CELL: whole}
    text = to_markdown({**now, "results": [whole]})
    assert "other cells from commit old, d, `python benchmarks/attention.py`" in text


def test_cells_of_other_conditions_are_not_kept(tmp_path):
    now = {**document(), "schema": attention.SCHEMA, "new_tokens": 33}
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps({**now, "processor": "q", "versions": {"torch": "1"}}))
    with pytest.raises(SystemExit, match=r"versions: .*'1'}, now .*'2'}; processor: q, now p$"):
        keep_earlier(path, now)


def test_a_process_that_fails_is_a_failed_cell(monkeypatch):
    def fail(*arguments):
        raise WorkerError("ended with 1: MemoryError")

    monkeypatch.setattr(attention, "run_process", fail)
    result = run_cell(CELL, options(), CONFIG, CEILINGS, 1e9, "")
    assert (result["status"], attention.failures(result)) == ("failed", ["ended with 1: MemoryError"])


def test_every_case_has_all_contestants_before_the_next_begins():
    cells = list(make_cells(options(), CONFIG))
    assert len(cells) == 8
    assert [cell.contestant for cell in cells] == ["torch", "transformers"] * 4
    assert [(cell.batch, cell.length) for cell in cells[::2]] == [(1, 128), (1, 256), (2, 128), (2, 256)]


def test_speed_up_and_saving_are_those_of_the_published_page():
    eager, fused = ({"step_seconds": s, "step_bytes": b} for s, b in ((3.0, 8_000_000), (2.0, 6_000_000)))
    text = to_markdown(document(row(eager=eager, sdpa=fused)))
    assert "| 8 | 2048 | 3.000 | 2.000 | 50 | 8 | 6 | 25 |  |" in text


def test_an_implementation_that_failed_fails_its_cell_and_is_in_the_table():
    result = row(eager={"failed": "OutOfMemoryError: 7 GiB"}, sdpa={"step_seconds": 2.0, "step_bytes": 6_000_000})
    assert attention.failures(result) == ["eager: OutOfMemoryError: 7 GiB"]
    assert "OutOfMemoryError: 7 GiB" in to_markdown(document(result))


def job(**changes) -> Job:
    usual = Job("training", "torch", {}, "cpu", "float32", 1, 8, ("eager", "sdpa"), 3, 60.0)
    return usual._replace(**changes)


def test_calls_take_turns_and_one_turn_is_always_made():
    order = []
    calls = {(name, "step"): lambda name=name: order.append(name) for name in ("eager", "sdpa")}
    *_, (seconds, _) = in_turn(calls, lambda result: None, job())
    assert {len(samples) for samples in seconds.values()} == {3}
    assert order == ["eager", "sdpa"] * 3
    *_, (seconds, _) = in_turn(calls, lambda result: None, job(seconds=0.0))
    assert {len(samples) for samples in seconds.values()} == {1}


@pytest.mark.parametrize(
    ("device", "part", "first"), [("cpu", "training", 0), ("cpu", "attention", 1), ("cuda", "training", 1)]
)
def test_where_it_matters_a_call_before_each_sample_is_not_timed(monkeypatch, device, part, first):
    monkeypatch.setattr(attention_worker, "SAMPLE_SECONDS", 0.0)  # one call a sample, on a GPU as well
    made = []
    list(in_turn({("eager", "step"): lambda: made.append(1)}, lambda result: None, job(device=device, part=part)))
    assert len(made) == 3 * (1 + first)


def test_a_sample_on_a_gpu_is_the_mean_of_calls_that_fill_its_time():
    waits, made = [], []
    calls = {("eager", "step"): lambda: made.append(time.sleep(0.005))}
    *_, (seconds, _) = in_turn(calls, lambda result: waits.append(len(made)), job(device="cuda", runs=1))
    assert waits[0] == 1
    assert waits[1] - waits[0] >= 3
    assert 0.004 < seconds["eager", "step"][0] < 0.05


def test_a_call_that_fails_in_a_later_turn_leaves_the_others_their_figures():
    left = iter([1, 2])
    calls = {("sdpa", "step"): lambda: next(left), ("eager", "step"): lambda: None}
    *_, (seconds, failed) = in_turn(calls, lambda result: None, job())
    assert failed == {("sdpa", "step"): "StopIteration: "}
    assert len(seconds["eager", "step"]) == 3


def test_what_a_process_had_measured_before_it_was_stopped_is_kept(monkeypatch):
    def stop(*arguments):
        raise WorkerError("took longer than 9 seconds", {"sdpa": {"step_bytes": 1, "step_seconds": 2.0}, "eager": {}})

    monkeypatch.setattr(attention, "run_process", stop)
    result = run_cell(CELL, options(), CONFIG, CEILINGS, 1e9, "")
    assert result["results"]["sdpa"]["step_seconds"] == 2.0
    assert attention.failures(result) == ["eager: took longer than 9 seconds"]


def test_the_prompt_is_in_the_table_of_inference():
    figures = [{"step_seconds": 0.02, "prefill_seconds": s, "step_bytes": 1_000_000} for s in (0.3, 0.2)]
    text = to_markdown(document({**row(eager=figures[0], sdpa=figures[1]), "part": "inference"}))
    assert "| 300.0 | 200.0 | 50 |" in text


@pytest.mark.slow
@pytest.mark.parametrize("contestant", attention.CONTESTANTS)
def test_a_tiny_model_is_measured_in_every_part(contestant, tmp_path):
    tiny = ["--size", "opt-tiny", "--batches", "1", "--lengths", "32", "--new-tokens", "5", "--runs", "1"]
    command = [sys.executable, attention.__file__, *tiny, "--contestants", contestant, "--device", "cpu"]
    done = subprocess.run([*command, "--plot", str(tmp_path / "p.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["results"]
    parts = [part for part in attention.PARTS if contestant != attention.PEER or part not in attention.ALONE]
    assert [(r["part"], r["status"]) for r in rows] == [(part, "ok") for part in parts]
    assert (tmp_path / "p.png").stat().st_size
