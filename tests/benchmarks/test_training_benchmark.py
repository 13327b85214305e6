"""The benchmark of training steps: every contestant is in the document, and all of them train the same."""

import json
import sys

import pytest

from benchmarks import training
from benchmarks.training_worker import CONTESTANTS, Job, batches
from opt_core import OPTConfig
from opt_zoo.bench.turns import WorkerError

CEILINGS = {"bytes_per_second": 2e10, "flops_per_second": 1e9}
SAMPLE = {
    "step_seconds": 0.5, "steps": [0.5], "compile_seconds": 3.0, "losses": [7.0, 6.0, 5.0], "peak_bytes": 11_000_000,
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The document of a command line; processes are answered by a function of the job."""

    def run(answer, *arguments) -> tuple[int, dict, str]:
        def process(module, words, device, timeout):
            return dict(CEILINGS) if module.endswith("ceilings") else dict(answer(Job(*json.loads(words[0]))))

        if answer is not None:
            monkeypatch.setattr(training, "run_process", process)
        monkeypatch.setattr(sys, "argv", ["training.py", "--size", "opt-tiny", *map(str, arguments)])
        code = training.main()
        out = capsys.readouterr().out
        return code, json.loads(out.splitlines()[-1]), out

    return run


def test_every_contestant_has_a_row_in_every_dtype(run):
    code, document, out = run(lambda job: SAMPLE, "--repeats", 2)
    assert code == 0
    assert [(row["dtype"], row["contestant"]) for row in document["results"]] == [
        (dtype, contestant) for dtype in ("float32", "bfloat16") for contestant in CONTESTANTS
    ]
    assert all(len(row["samples"]) == 2 for row in document["results"])
    assert out.count("| 0.500 |") == 2 * len(CONTESTANTS)


def test_a_share_is_that_of_the_rate_of_the_same_turn(run):
    _, document, _ = run(lambda job: SAMPLE, "--batch", 3, "--length", 7)
    flops = training.training_flops(config_of_tiny(), 3, 7)
    row = document["results"][0]
    assert row["matrix_rate_share"] == pytest.approx(flops / 0.5 / 1e9)
    assert row["floor_seconds"] == pytest.approx(flops / 1e9)
    assert row["tokens_per_second"] == 3 * 7 / 0.5


def config_of_tiny() -> OPTConfig:
    from opt_zoo.embedded import embedded_folder

    return OPTConfig.from_json(embedded_folder())


def test_what_fails_fails_the_command_and_what_is_not_installed_does_not(run):
    def answer(job):
        if job.contestant == "opt-zoo tf":
            raise WorkerError("ended with 1: MemoryError")
        return {"not_run": "jax not installed"} if "flax" in job.contestant else SAMPLE

    code, document, out = run(answer, "--dtypes", "float32")
    status = {row["contestant"]: row["status"] for row in document["results"]}
    assert code == 1
    assert (status["opt-zoo tf"], status["opt-zoo flax"], status["opt-zoo torch"]) == ("failed", "not run", "ok")
    assert "failed: ended with 1: MemoryError" in out
    assert "not run: jax not installed" in out


def test_everybody_gets_the_same_batches(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 97}')
    jobs = (Job(name, str(tmp_path), "float32", 3, 5, 1, 2) for name in CONTESTANTS)
    first, *others = (batches(job) for job in jobs)
    assert first.shape == (3, 3, 5)
    assert first.min() >= 4
    assert all((other == first).all() for other in others)


@pytest.mark.slow
def test_all_contestants_begin_with_the_same_loss(run):
    size = ["--batch", 2, "--length", 13, "--runs", 1, "--warm-up", 1, "--repeats", 1]
    code, document, _ = run(None, *size, "--dtypes", "float32")
    assert code == 0
    losses = [row["first_losses"][0] for row in document["results"] if row["status"] == "ok"]
    assert len(losses) >= 3
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    assert all(row["peak_bytes"] > 1e6 for row in document["results"] if row["status"] == "ok")
