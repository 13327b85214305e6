"""`opt-zoo bench`: every asked cell is in the document, what did not run says why, shares are right."""

import json
from pathlib import Path

import numpy as np
import pytest
from harness import config_of

from opt_core import OPTConfig
from opt_zoo.backends import BACKENDS
from opt_zoo.bench import ceilings, turns
from opt_zoo.bench.contestant import Contestant, NotRunError
from opt_zoo.bench.peers import TransformersFlax, TransformersTF
from opt_zoo.bench.plot import points, roof
from opt_zoo.bench.summary import derived, quartiles
from opt_zoo.bench.turns import WorkerError, make_cells, run_process
from opt_zoo.bench.work import Work, parameters_read, work_of
from opt_zoo.bench.worker import Job, measure_seconds, split

QUICK = ["--backends", "torch", "--dtypes", "float32", "--batches", "2,3", "--prompt", "5", "--new-tokens", "7"]
ONCE = ["--repeats", "1", "--runs", "1"]
CEILINGS = {"bytes_per_second": 2e10, "flops_per_second": 3e11}
SAMPLE = {
    "import_seconds": 1.0, "load_seconds": 0.5, "first_token_seconds": 0.75, "prefill_seconds": 0.25,
    "step_seconds": 0.125, "tokens": [5, 7], "peak_bytes": 11_000_000, "peak_gpu_bytes": None,
}  # fmt: skip


@pytest.fixture
def without_processes(monkeypatch):
    """Answers in place of the workers, which need no weights: a function of the job, which a test may replace."""
    answers = {"worker": lambda job: SAMPLE}

    def run(module, arguments, device, timeout):
        return (
            dict(CEILINGS) if module.endswith("ceilings") else dict(answers["worker"](Job(*json.loads(arguments[0]))))
        )

    monkeypatch.setattr(turns, "run_process", run)
    copies = lambda source, parent, wanted: dict.fromkeys(wanted, parent)  # noqa: E731
    monkeypatch.setattr("opt_zoo.bench.checkpoints.write_copies", copies)
    return answers


# -- the command ------------------------------------------------------------------------------------------------------


def test_a_backend_is_measured_in_processes_of_its_own(opt_zoo, tmp_path):
    code, out, err = opt_zoo(
        "bench", "opt-tiny", *QUICK, "--batches", "3", *ONCE, "--output", tmp_path / "b.json", "--device", "cpu"
    )
    assert code == 0, err
    printed, written = json.loads(out.splitlines()[-1]), json.loads((tmp_path / "b.json").read_text())
    assert [(row["contestant"], row["batch"], row["status"]) for row in printed["results"]] == [
        ("opt-zoo torch", 3, "ok")
    ]
    for row in written["results"]:
        (sample,) = row["samples"]
        assert len(sample["tokens"]) == 7
        assert 0 < sample["load_seconds"] < sample["first_token_seconds"]
        assert sample["bytes_per_second"] > 1e8
        assert sample["flops_per_second"] > 1e8
    assert written["versions"]["torch"]
    assert written["commit"]


def test_json_alone_has_every_cell_that_was_asked_for(opt_zoo, without_processes):
    arguments = [
        "bench",
        "opt-125m",
        "--backends",
        "torch,flax",
        "--peers",
        "transformers,ctranslate2",
        "--batches",
        "1",
    ]
    without_processes["worker"] = lambda job: SAMPLE if job.dtype == "float32" else {"not_run": "no such dtype"}
    code, out, _ = opt_zoo(*arguments, "--device", "cpu", "--json")
    document = json.loads(out)
    names = ["opt-zoo torch", "opt-zoo flax", "transformers torch", "transformers flax", "ctranslate2"]
    assert [(row["contestant"], row["dtype"]) for row in document["results"]] == [
        (name, dtype) for dtype in ("float32", "bfloat16") for name in names
    ]
    assert code == 0


def test_what_does_not_run_says_why_and_is_no_failure(opt_zoo, without_processes):
    without_processes["worker"] = lambda job: {"not_run": "ctranslate2 not installed"} if job.peer else SAMPLE
    code, out, _ = opt_zoo("bench", "opt-tiny", *QUICK, "--peers", "ctranslate2")
    rows = json.loads(out.splitlines()[-1])["results"]
    assert [row["status"] for row in rows] == ["ok", "not run"] * 2
    assert "ctranslate2, float32, batch 3, prompt 5: not run: ctranslate2 not installed" in out
    assert code == 0


def test_a_process_that_fails_is_reported_with_its_error_and_exit_code_1(opt_zoo, without_processes):
    tried = []

    def worker(job):
        tried.append(job)
        if job.batch == 3:
            raise WorkerError("ended with 1: MemoryError")
        return SAMPLE

    without_processes["worker"] = worker
    code, out, _ = opt_zoo("bench", "opt-tiny", *QUICK, "--repeats", "5", "--json")
    rows = json.loads(out)["results"]
    assert [(row["status"], row["reason"]) for row in rows] == [("ok", ""), ("failed", "ended with 1: MemoryError")]
    assert code == 1
    assert [job.batch for job in tried] == [2, 3, 2, 2, 2, 2]


def test_a_run_that_is_stopped_leaves_what_it_had_measured(opt_zoo, without_processes, tmp_path):
    path, seen = tmp_path / "b.json", []

    def worker(job):
        seen.append(
            [(row["batch"], len(row["samples"])) for row in json.loads(path.read_text())["results"]] if seen else []
        )
        if len(seen) == 4:
            raise KeyboardInterrupt
        return SAMPLE

    without_processes["worker"] = worker
    code, _, _ = opt_zoo("bench", "opt-tiny", *QUICK, "--repeats", "5", "--output", path)
    assert code == 130
    assert seen == [[], [(2, 1)], [(2, 1), (3, 1)], [(2, 2), (3, 1)]]
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_arguments_are_refused_all_at_once(opt_zoo, tmp_path):
    wrong = ["--new-tokens", "2", "--repeats", "0", "--runs", "0", "--plot", tmp_path / "no" / "p.png"]
    code, out, err = opt_zoo("bench", "opt-tiny", "--prompt", "5000", *wrong)
    assert (code, out) == (2, "")
    for option in ("--new-tokens: expected 3 or more, got 2", "--repeats", "--runs", "--plot", "leaves room for"):
        assert option in err


@pytest.mark.parametrize(
    "arguments",
    [["--batches", "0"], ["--batches", "1,x"], ["--prompt", ""], ["--peers", "vllm"], ["--dtypes", "float64"]],
)
def test_wrong_lists_are_wrong_usage(opt_zoo, arguments):
    code, out, err = opt_zoo("bench", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: opt-zoo bench")


# -- processes --------------------------------------------------------------------------------------------------------


def test_a_missing_framework_is_not_run_and_names_the_extra(monkeypatch):
    monkeypatch.setitem(BACKENDS, "tf", BACKENDS["tf"]._replace(frameworks=("no_such_framework",)))
    from opt_zoo.bench.worker import measure

    job = Job("", "tf", "nowhere", "cpu", "float32", 2, 5, 7, 1)
    assert measure(job) == {"not_run": "backend tf needs no_such_framework: pip install opt-zoo[tf]"}


@pytest.mark.parametrize("peer", [TransformersTF, TransformersFlax])
def test_transformers_5_has_pytorch_alone(monkeypatch, peer):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "5.17.0")
    monkeypatch.setattr("importlib.util.find_spec", lambda package: object())
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "")
    with pytest.raises(NotRunError, match=r"transformers 5\.17\.0 has no (TensorFlow|Flax) classes"):
        peer("nowhere", "cpu", "float32").start()


def test_a_process_that_ends_badly_gives_its_last_words():
    with pytest.raises(WorkerError, match=r"ended with 1: .*JSONDecodeError"):
        run_process("opt_zoo.bench.worker", ["no json"], "cpu", 60)


def test_a_process_has_only_its_time():
    with pytest.raises(WorkerError, match=r"took longer than 0\.01 seconds"):
        run_process("opt_zoo.bench.ceilings", ["cpu", "float32"], "cpu", 0.01)


@pytest.mark.parametrize("end", ["raise SystemExit(3)", "import time; time.sleep(60)"])
def test_what_a_process_had_printed_before_it_failed_comes_with_the_error(monkeypatch, tmp_path, end):
    (tmp_path / "talking.py").write_text(f"print('{{\"x\": 1}}')\nprint('{{broken}}', flush=True)\n{end}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(WorkerError) as caught:
        run_process("talking", [], "cpu", 3)
    assert caught.value.partial == {"x": 1}


class Counting(Contestant):
    """Gives tokens at once, `missing` fewer than asked for."""

    framework, missing = "torch", 0

    def start(self):
        pass

    def load(self):
        pass

    def generate(self, ids_BT, new_tokens):
        return np.tile(np.arange(new_tokens - self.missing), (len(ids_BT), 1))


def test_a_contestant_that_ends_early_is_no_contestant():
    contestant, job = Counting("", "cpu", "float32"), Job("", "torch", "", "cpu", "float32", 2, 5, 7, 1)
    ids_BT = np.zeros((2, 5), np.int64)
    assert measure_seconds(contestant, job, ids_BT)["tokens"] == list(range(7))
    contestant.missing = 1
    with pytest.raises(AssertionError, match=r"1 tokens for 2 rows were asked for, got \(2, 0\)"):
        measure_seconds(contestant, job, ids_BT)


def test_peers_of_several_frameworks_come_in_those_of_the_backends():
    cells = list(make_cells(["tf"], ["transformers", "ctranslate2"], ["float16"], [3], [5, 7]))
    names = ["opt-zoo tf", "transformers tf", "ctranslate2"]
    assert [(cell.contestant, cell.prompt_tokens) for cell in cells] == [(n, T) for T in (5, 7) for n in names]
    assert [cell.format for cell in cells[:3]] == ["safetensors", "tf-safetensors", "safetensors"]


# -- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("few", [1, 2])
def test_a_step_and_the_prefill_follow_from_two_calls(few):
    prefill, step, many = 3.0, 0.25, 11
    call = lambda tokens: prefill + step * (tokens - 1)  # noqa: E731
    assert split([(call(few), call(many)), (call(few) + 1, call(many) + 1), (0, 9)], few, many) == (step, prefill)


def test_a_share_is_work_over_time_over_the_ceiling():
    work = Work(step_bytes=1e9, step_flops=0, prefill_bytes=0, prefill_flops=15e9)
    figures = derived({**SAMPLE, **CEILINGS}, work, batch=3)
    assert figures["tokens_per_second"] == 24
    assert figures["step_bytes_per_second"] == 8e9
    assert figures["floor_seconds"] == 0.05
    assert figures["bandwidth_share"] == 0.4
    assert figures["prefill_flops_per_second"] == 6e10
    assert figures["matrix_rate_share"] == 0.2


def test_a_step_lost_in_noise_and_a_ceiling_not_measured_give_no_figure():
    work = Work(1, 1, 1, 1)
    noisy = derived({**SAMPLE, "step_seconds": -0.1, "bytes_per_second": None, "flops_per_second": 1.0}, work, 1)
    assert [noisy[name] for name in ("step_seconds", "tokens_per_second", "floor_seconds", "bandwidth_share")] == [
        None
    ] * 4
    assert noisy["matrix_rate_share"] == 4


def test_quartiles_of_five_are_the_second_and_the_fourth():
    assert quartiles([5, 1, 4, 2, 3]) == [2, 4]
    assert quartiles([7]) == [7, 7]
    assert quartiles([]) is None


def test_a_step_reads_the_weights_but_the_rows_of_tables_and_the_filled_cache():
    config = OPTConfig.preset("opt-125m")
    assert parameters_read(config) == 125_239_296 - 2050 * 768
    work = work_of(config, "bfloat16", batch=8, prompt_tokens=128, new_tokens=64)
    assert work.step_bytes == 2 * parameters_read(config) + 2 * 2 * 12 * 768 * 8 * 160
    in_layers = 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert work.prefill_flops == 8 * (2 * 128 * in_layers + 2 * 50272 * 768 + 2 * 12 * 768 * 128**2)
    assert work.step_flops == 8 * (2 * in_layers + 2 * 50272 * 768 + 4 * 12 * 768 * 160)


def test_an_untied_head_is_read_in_place_of_the_embeddings():
    assert parameters_read(config_of(tie_word_embeddings=False)) == parameters_read(config_of())


def test_the_ceilings_of_a_small_buffer_and_matrix_are_positive(monkeypatch):
    monkeypatch.setattr(ceilings, "REPEATS", 2)
    assert ceilings.read_bandwidth(1 << 20) > 1e6
    assert ceilings.numpy_matrix_rate(64) > 1e6


def test_a_point_of_the_roofline_under_a_roof():
    row = {"step_flops": 6e9, "step_bytes": 3e9, "step_seconds": 0.5, "prefill_seconds": None}
    assert points(row) == [("step", 2.0, 1.2e10)]
    assert roof([{**row, **CEILINGS}]) == (2e10, 3e11)
    assert roof([row]) is None


def test_the_plot_is_a_picture_also_where_nothing_ran(opt_zoo, without_processes, tmp_path: Path):
    without_processes["worker"] = lambda job: SAMPLE if job.dtype == "float32" else {"not_run": "no such dtype"}
    opt_zoo("bench", "opt-tiny", "--backends", "torch,flax", "--plot", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
