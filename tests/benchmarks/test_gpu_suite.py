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


def written(folder: Path, failures: int = 0, skipped: int = 0, cases: str = "") -> Path:
    (folder / "tests-torch.xml").write_text(XML.format(failures=failures, skipped=skipped, cases=cases))
    return folder


def test_without_a_gpu_nothing_is_run_and_the_code_is_2(tmp_path):
    command = [sys.executable, gpu_suite.__file__, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "-1"})
    assert (done.returncode, "no NVIDIA GPU" in done.stdout) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_every_file_with_the_marker_is_run():
    found = {Path(path).name for paths in gpu_test_files().values() for path in paths}
    assert {"test_torch_attention.py", "test_flax_attention_pallas.py", "test_tf_attention.py"} <= found


def test_a_backend_that_is_not_installed_is_not_run(tmp_path):
    parts = {p.name: p for p in parts_of_tests(OPTIONS, INSTALLED, {}, tmp_path)}
    result = run_part(parts["tests tf_attention"], tmp_path, time.monotonic() + 100)
    assert (result["status"], result["reason"]) == ("not run", "tensorflow not installed")
    assert parts["tests torch_attention"].lacks == ""
    assert "tf: not run, tensorflow not installed" in gpu_suite.notes_on(INSTALLED)


def test_without_pytest_benchmarks_still_run(tmp_path):
    installed = {name: version for name, version in INSTALLED.items() if name != "pytest"}
    parts = list(gpu_suite.make_parts(OPTIONS, installed, tmp_path))
    assert {part.lacks for part in parts if part.kind == "benchmark"} == {""}
    assert all("pytest not installed" in p.lacks or "pytest and" in p.lacks for p in parts if p.kind == "tests")


def test_without_blake3_a_stand_in_hashes(tmp_path):
    """As many digits; and where it is installed, it is what is imported."""
    installed = {name: version for name, version in INSTALLED.items() if name != "blake3"}
    (environment,) = {p.environment["PYTHONPATH"] for p in gpu_suite.make_parts(OPTIONS, installed, tmp_path)}
    code = "import blake3; b = blake3.blake3(); b.update(b'x'); print(len(b.hexdigest()), blake3.__file__)"
    part = Part("tests x", [sys.executable, "-S", "-c", code], 1.0, {"PYTHONPATH": environment}, "tests")
    run_part(part, tmp_path, time.monotonic() + 60)
    assert (tmp_path / "tests-x.log").read_text().strip() == f"64 {tmp_path / 'stand-ins' / 'blake3.py'}"
    assert any("blake3" in note for note in gpu_suite.notes_on(installed))
    assert all("PYTHONPATH" not in p.environment for p in gpu_suite.make_parts(OPTIONS, INSTALLED, tmp_path))


def test_tests_run_on_the_gpu_without_tf32(tmp_path):
    parts = list(parts_of_tests(OPTIONS, INSTALLED, gpu_suite.ON_GPU, tmp_path))
    assert all(p.environment["JAX_PLATFORMS"].startswith("cuda") for p in parts)
    assert all(p.environment["NVIDIA_TF32_OVERRIDE"] == "0" for p in parts)


def test_counts_and_names_come_from_pytest(tmp_path):
    result = judge_tests(part(), written(tmp_path, failures=1, skipped=2, cases=CASE), 1)
    assert (result["status"], result["counts"]["passed"], result["failed"]) == ("failed", 4, ["tests.x::test_y"])
    assert judge_tests(part(), written(tmp_path, skipped=2), 0)["status"] == "passed"


def test_a_part_whose_tests_are_all_skipped_has_not_passed(tmp_path):
    assert judge_tests(part(), written(tmp_path, skipped=7), 0)["status"] == "not run"


def test_a_process_that_dies_has_failed_with_its_last_line(tmp_path):
    result = run_part(part("-c", "raise SystemExit('out of everything')"), tmp_path, time.monotonic() + 60)
    assert result["status"] == "failed"
    assert "out of everything" in result["reason"]


def test_the_deadline_stops_a_part_and_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "LEAST_SECONDS", 0.5)
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    result = run_part(part("-c", code), tmp_path, start + 1.5)
    assert time.monotonic() - start < 10
    assert (result["status"], "end of its time" in result["reason"]) == ("failed", True)
    assert run_part(part("-c", code), tmp_path, start)["reason"] == "no time was left"


def test_a_crash_leaves_the_outcomes_before_it_and_names_its_test(tmp_path):
    """A hang does, too: as far as pytest had come, it has said so."""
    file = tmp_path / "test_crashing.py"
    file.write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('x', [1, 2, 3], ids='one document,2,3'.split(','))\n"
        "def test_it(x):\n    assert x != 2\n    x < 3 or os._exit(9)\n"
    )
    result = run_part(part("-m", "pytest", "-v", "-p", "no:cacheprovider", str(file)), tmp_path, time.monotonic() + 60)
    assert (result["counts"]["passed"], result["counts"]["failures"]) == (1, 1)
    assert result["reason"].startswith("pytest ended with 9, in ")
    assert result["reason"].endswith("test_crashing.py::test_it[3]")
    assert [name.rpartition("::")[2] for name in result["failed"]] == ["test_it[2]"]
    assert "stopped at the end" in judge_tests(part(), tmp_path, None)["reason"]


def test_a_benchmark_that_was_stopped_keeps_its_cells(tmp_path):
    (tmp_path / "attention.json").write_text(json.dumps({"results": [1]}))
    result = judge_benchmark(part(kind="benchmark"), tmp_path, None)
    assert (result["status"], result["document"]) == ("failed", {"results": [1]})


def test_the_report_has_a_line_for_each_part(tmp_path):
    rows = [gpu_suite.row(part(), "not run", "torch not installed"), judge_tests(part(), written(tmp_path), 0)]
    document = {"versions": {}, "gpu": None, "processor": "p", "commit": "c", "date": "d", "parts": rows}
    text = to_markdown(document, tmp_path)
    assert "| tests torch | not run |  |  |  |  | torch not installed |" in text
    assert "| tests torch | passed | 7 | 0 | 0 |  |  |" in text


@pytest.mark.slow
def test_the_whole_path_on_a_cpu(tmp_path):
    command = [sys.executable, gpu_suite.__file__, "--device", "cpu", "--quick", "--minutes", "4"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True)
    document = json.loads((tmp_path / "results.json").read_text())
    names = [part["name"] for part in document["parts"]]
    assert names == ["tests torch_attention", "tests tf_attention", "tests flax_attention", "attention", "training"]
    assert done.returncode == (1 if any(part["status"] == "failed" for part in document["parts"]) else 0)
    assert document["parts"][3]["document"]["results"]
