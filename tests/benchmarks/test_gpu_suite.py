"""The GPU suite without a GPU: every part is in the result, what fails fails it, what is absent is not passed."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import (
    Part,
    gpu_test_files,
    judge_benchmark,
    judge_tests,
    parts_of_tests,
    run_part,
    to_markdown,
)

INSTALLED = dict.fromkeys((*gpu_suite.NEEDED_BY_TESTS, "blake3", "torch", "keras", "jax", "flax"), "1")
OPTIONS = argparse.Namespace(quick=False, device="cuda", python=sys.executable)
XML = '<a><testsuite tests="7" failures="{failures}" errors="0" skipped="{skipped}">{cases}</testsuite></a>'
CASE = '<testcase classname="tests.x" name="test_y"><failure message="no"/></testcase>'


def part(*code: str, share: float = 1.0, kind: str = "tests", lacks: str = "") -> Part:
    return Part("tests torch" if kind == "tests" else "attention", [sys.executable, *code], share, {}, kind, lacks)


@pytest.fixture
def folder(tmp_path):
    """Of the results, as the suite makes it."""
    (tmp_path / gpu_suite.DETAILS).mkdir()
    return tmp_path


def written(folder: Path, failures: int = 0, skipped: int = 0, cases: str = "") -> Path:
    part().file(folder, "xml").write_text(XML.format(failures=failures, skipped=skipped, cases=cases))
    return folder


def test_without_a_gpu_nothing_is_run_and_the_code_is_2(tmp_path):
    command = [sys.executable, gpu_suite.__file__, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "-1"})
    assert (done.returncode, "no NVIDIA GPU" in done.stdout) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_every_file_with_the_marker_is_run():
    found = {Path(path).name for paths in gpu_test_files().values() for path in paths}
    assert {"test_torch_attention.py", "test_flax_attention_pallas.py", "test_tf_attention.py"} <= found


def test_a_backend_that_is_not_installed_is_not_run(folder):
    parts = {p.name: p for p in parts_of_tests(OPTIONS, INSTALLED, {}, folder)}
    result = run_part(parts["tests tf_attention"], folder, time.monotonic() + 100)
    assert (result["status"], result["reason"]) == ("not run", "tensorflow not installed")
    assert parts["tests torch_attention"].lacks == ""
    assert "tf: not run, tensorflow not installed" in gpu_suite.notes_on(INSTALLED)


def test_without_pytest_benchmarks_still_run(folder):
    installed = {name: version for name, version in INSTALLED.items() if name != "pytest"}
    parts = list(gpu_suite.make_parts(OPTIONS, installed, folder))
    assert {part.lacks for part in parts if part.kind == "benchmark"} == {""}
    assert all("pytest not installed" in p.lacks or "pytest and" in p.lacks for p in parts if p.kind == "tests")


def test_without_blake3_a_stand_in_hashes(folder):
    """As many digits; and where it is installed, it is what is imported."""
    installed = {name: version for name, version in INSTALLED.items() if name != "blake3"}
    (environment,) = {p.environment["PYTHONPATH"] for p in gpu_suite.make_parts(OPTIONS, installed, folder)}
    code = "import blake3; b = blake3.blake3(); b.update(b'x'); print(len(b.hexdigest()), blake3.__file__)"
    part = Part("tests x", [sys.executable, "-S", "-c", code], 1.0, {"PYTHONPATH": environment}, "tests")
    run_part(part, folder, time.monotonic() + 60)
    assert part.file(folder, "log").read_text().strip() == f"64 {folder / 'details' / 'stand-ins' / 'blake3.py'}"
    assert any("blake3" in note for note in gpu_suite.notes_on(installed))
    assert all("PYTHONPATH" not in p.environment for p in gpu_suite.make_parts(OPTIONS, INSTALLED, folder))


def test_tests_run_on_the_gpu_without_tf32(folder):
    parts = list(parts_of_tests(OPTIONS, INSTALLED, gpu_suite.ON_GPU, folder))
    assert all(p.environment["JAX_PLATFORMS"].startswith("cuda") for p in parts)
    assert all(p.environment["NVIDIA_TF32_OVERRIDE"] == "0" for p in parts)


def test_counts_and_names_come_from_pytest(folder):
    result = judge_tests(part(), written(folder, failures=1, skipped=2, cases=CASE), 1)
    assert (result["status"], result["counts"]["passed"], result["failed"]) == ("failed", 4, ["tests.x::test_y: no"])
    assert judge_tests(part(), written(folder, skipped=2), 0)["status"] == "passed"


def test_a_part_whose_tests_are_all_skipped_has_not_passed(folder):
    assert judge_tests(part(), written(folder, skipped=7), 0)["status"] == "not run"


def test_a_process_that_dies_has_failed_with_its_last_line(folder):
    result = run_part(part("-c", "raise SystemExit('out of everything')"), folder, time.monotonic() + 60)
    assert result["status"] == "failed"
    assert "out of everything" in result["reason"]


def test_the_deadline_stops_a_part_and_all_that_it_started(folder, monkeypatch):
    monkeypatch.setattr(gpu_suite, "LEAST_SECONDS", 0.5)
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    result = run_part(part("-c", code), folder, start + 1.5)
    assert time.monotonic() - start < 10
    assert (result["status"], "end of its time" in result["reason"]) == ("failed", True)
    assert run_part(part("-c", code), folder, start)["reason"] == "no time was left"


def test_a_crash_names_its_test_and_the_tests_behind_it_run_in_another_process(folder, monkeypatch):
    """A hang, too, leaves the outcomes before it: as far as pytest had come, it has said so."""
    file = folder / "test_crashing.py"
    file.write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('x', [1, 2, 3, 4], ids='one document,2,3,4'.split(','))\n"
        "def test_it(x):\n    assert x != 2\n    x != 3 or os._exit(9)\n"
    )
    monkeypatch.setattr(gpu_suite, "ROOT", folder)
    run = part("-m", "pytest", "-v", "-p", "no:cacheprovider", str(file))
    run.command.append(f"--junitxml={run.file(folder, 'xml')}")
    result = run_part(run, folder, time.monotonic() + 60)
    assert (result["status"], result["counts"]["passed"], result["counts"]["failures"]) == ("failed", 2, 1)
    assert result["reason"].startswith("pytest ended with 9, in ")
    assert result["reason"].endswith("test_crashing.py::test_it[3]")
    assert [name.rpartition("::")[2] for name in result["failed"]] == ["test_it[2]"]
    assert "stopped at the end" in judge_tests(part(), folder, None)["reason"]


def test_a_benchmark_that_was_stopped_keeps_its_cells(folder):
    part(kind="benchmark").file(folder, "json").write_text(json.dumps({"results": [1]}))
    result = judge_benchmark(part(kind="benchmark"), folder, None)
    assert (result["status"], result["document"]) == ("failed", {"results": [1]})


def test_the_report_has_a_line_for_each_part(folder):
    rows = [gpu_suite.row(part(), "not run", "torch not installed"), judge_tests(part(), written(folder), 0)]
    document = {
        "versions": {},
        "gpu": None,
        "driver": None,
        "processor": "p",
        "commit": "c",
        "date": "d",
        "parts": rows,
    }
    text = to_markdown(document, folder)
    assert "| tests torch | not run |  |  |  |  | torch not installed |" in text
    assert "| tests torch | passed | 7 | 0 | 0 |  |  |" in text


def test_a_benchmark_in_which_nothing_ran_is_not_ok(folder):
    cell = {"status": "not run", "reason": "torch sees no GPU"}
    part(kind="benchmark").file(folder, "json").write_text(json.dumps({"results": [cell, cell]}))
    result = judge_benchmark(part(kind="benchmark"), folder, 0)
    assert (result["status"], result["reason"]) == ("not run", "torch sees no GPU")


def test_results_of_an_earlier_run_are_not_taken_for_this_one(folder):
    earlier = part("-c", "raise SystemExit(1)", kind="benchmark")
    earlier.file(folder, "json").write_text(json.dumps({"results": [{"status": "ok"}]}))
    assert run_part(earlier, folder, time.monotonic() + 60)["document"] is None


def cells_of(contestant: str, what: str, **results) -> dict:
    results = {name: {"both_seconds": x, "step_seconds": x, "matrix_rate_share": x} for name, x in results.items()}
    return dict(part=what, contestant=contestant, dtype="bfloat16", batch=8, length=2048, status="ok", results=results)


def test_goals_are_judged_by_the_best_library_the_matrix_rate_and_transformers():
    attention = cells_of(
        "torch", "attention", **{"sdpa": 1.3, "library:flash": 1.0, "library:cudnn": 2.0, "eager": 0.1}
    )
    slow = cells_of("flax", "attention", sdpa=1.0, cudnn=1.0, pallas=1.4)
    training = cells_of("torch", "training", sdpa=0.6)
    peer, alone = cells_of("transformers", "training", sdpa=0.5), cells_of("flax", "training")
    small = {"size": "opt-125m", "results": [cells_of("torch", "training", sdpa=0.6)]}  # without a peer of its own
    large = {"size": "opt-1.3b", "results": [attention, slow, training, peer, alone, cells_of("torch", "decoding")]}
    document = {"parts": [{"document": large}, {"name": "tests"}, {"document": small}]}
    found = [(goal.what.partition(": ")[2], goal.verdict) for goal in gpu_suite.goals(document)]
    library, share, against = (
        "by the best kernel of a library",
        "share of the matrix rate",
        "step_seconds by that of transformers",
    )
    assert found == [
        (f"sdpa {library}", "met"), (f"sdpa {library}", "met"), (f"pallas {library}", "NOT met"),
        (share, "met"), (against, "NOT met"), (share, "not measured"), (against, "not measured"),
        (share, "met"), (against, "not measured"),
    ]  # fmt: skip


def test_a_test_that_leaves_the_gpu_unusable_ends_its_process(folder, monkeypatch):
    root = gpu_suite.ROOT
    monkeypatch.setattr(gpu_suite, "ROOT", folder)
    (folder / "conftest.py").write_text((root / "tests/conftest.py").read_text())
    (folder / "test_x.py").write_text(
        "import pytest\n@pytest.mark.gpu\n@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_x(x):\n    if x == 1: raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
    )
    run = part("-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu", str(folder / "test_x.py"))
    run.environment["PYTHONPATH"] = f"{root}:{root / 'tests'}"
    run.command.append(f"--junitxml={run.file(folder, 'xml')}")
    result = run_part(run, folder, time.monotonic() + 60)
    assert (result["status"], result["counts"]["passed"]) == ("failed", 1)
    assert result["reason"].endswith("test_x.py::test_x[1]")


@pytest.mark.slow
def test_the_whole_path_on_a_cpu(tmp_path):
    command = [sys.executable, gpu_suite.__file__, "--device", "cpu", "--quick", "--minutes", "12"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True)
    document = json.loads((tmp_path / "results.json").read_text())
    names = [part["name"] for part in document["parts"]]
    assert names == ["tests torch_attention", "tests tf_attention", "tests flax_attention", "attention", "training"]
    assert {part["status"] for part in document["parts"]} == {"passed", "ok"}, document["parts"]
    assert done.returncode == 0
    assert document["parts"][3]["document"]["results"]
    assert (tmp_path / "attention.png").stat().st_size
