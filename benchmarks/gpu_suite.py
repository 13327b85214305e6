"""Every `gpu` test and every GPU benchmark, within a number of minutes, with whatever frameworks a Python has.

    python benchmarks/gpu_suite.py --minutes 10 --python PYTHON --output benchmarks/results/gpu-DATE

Tests first, each file in a process of its own and some side by side, TF32 off; then the benchmarks, each with its share
of the time that is left. Nothing is installed or downloaded. What is not installed is said at once, and what needs it
is not run, which is not passed. A test has a minute; a part that outlives its share is stopped, says in which test, and
keeps what it had. Where a test takes its process down, as an illegal address on a GPU does, the others run in another.
The folder gets results.json, results.md with the goals that are met and those that are not, a picture of each
benchmark, and in `details` what each part wrote. Exit code 1 where a part failed, 2 where there is no GPU (`--device
cpu --quick` tries the path without one), 3 where nothing was run.
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from opt_zoo.environment import commit, gpu_driver, gpu_model, has_gpu, processor_model  # noqa: E402

SCHEMA = "opt-zoo/gpu-suite/1"
FRAMEWORKS = {"torch": ("torch",), "tf": ("tensorflow", "keras"), "flax": ("jax", "flax", "optax")}
PACKAGES = ("torch", "tensorflow", "keras", "jax", "jaxlib", "flax", "optax", "transformers", "triton", "numpy")
PACKAGES += ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "jax-cuda12-plugin", "jax-cuda13-plugin", "flash-attn")
NEEDED = ("ml-dtypes", "msgpack", "numpy", "rich", "tokenizers")  # by every part
NEEDED_BY_TESTS = (*NEEDED, "pytest", "pytest-timeout")
# Few machines have it beside a GPU, and only the hashes of checkpoints that a part writes for itself are made with it.
STAND_IN = """import hashlib

def blake3(data=b"", **options):
    return hashlib.blake2b(data, digest_size=32)
"""
ON_GPU = {
    "JAX_PLATFORMS": "cuda,cpu",
    "JAX_TRACEBACK_FILTERING": "off",  # else the last line of each error is a note on that
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
}
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}
IN_TESTS = {"NVIDIA_TF32_OVERRIDE": "0", "OMP_NUM_THREADS": "4"}
DETAILS = "details"
QUICK_TO_COMPILE = "--xla_gpu_autotune_level=0"  # XLA would time several kernels for each product of each test
RESERVE_SECONDS = 15  # of all minutes, for the report
TESTS_SHARE = 0.4  # of the time, for all tests
PROCESSORS_A_TEST = 4  # a file of tests more runs for each so many
MARGIN_SECONDS = 8  # between the end of a benchmark's budget and that of its process
LOG_CHARACTERS = 4000  # of a part that did not succeed
MESSAGE_CHARACTERS = 300  # of a test that failed
LEAST_SECONDS = 5  # below it a part is not begun
TEST_SECONDS = 60  # for one test, compilation with it
LIBRARY_RATIO = 1.3  # goal: attention with gradients, ours by the best kernel of a library
RATE_SHARE = 0.5  # goal: of the measured matrix rate, in training
PEER_RATIO = 1.0  # goal: ours by that of transformers
OUTCOME = re.compile(r"^(?P<test>\S+::.*?)(?: (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)\b.*)?$")


class Part(NamedTuple):
    """One process of the suite."""

    name: str
    command: list[str]
    share: float  # of the time that is left when it begins
    environment: dict[str, str]
    kind: str  # "tests" or "benchmark"
    lacks: str = ""  # what is not installed

    def file(self, folder: Path, ending: str) -> Path:
        return folder / DETAILS / f"{self.name.replace(' ', '-')}.{ending}"


def main() -> int:
    options = parse_options()
    if options.device == "cuda" and not sees_gpu():
        print("no NVIDIA GPU that this process may use: nothing was run (--device cpu --quick tries the path)")
        return 2
    folder = Path(options.output).absolute()
    (folder / DETAILS).mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes - RESERVE_SECONDS
    versions = versions_of(options.python)
    notes = notes_on(versions)
    print("\n".join(notes), file=sys.stderr, flush=True)
    document: dict[str, Any] = {"schema": SCHEMA, **conditions(options, versions), "notes": notes, "parts": []}
    for result in run_parts(list(make_parts(options, versions, folder)), folder, deadline):
        document["parts"].append(result)
        print(f"{result['name']}: {result['status']} {result['reason']}", file=sys.stderr, flush=True)
        write(document, folder)
    print(to_markdown(document, folder))
    print(json.dumps({**document, "parts": [short(part) for part in document["parts"]]}, allow_nan=False))
    statuses = {part["status"] for part in document["parts"]}
    return 1 if "failed" in statuses else 0 if statuses & {"passed", "ok"} else 3


def sees_gpu() -> bool:
    """By the driver's folder in /proc, or where a container hides that, by its device."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return has_gpu() or (not hidden and Path("/dev/nvidia0").exists())


def parse_options() -> argparse.Namespace:
    today = datetime.datetime.now(datetime.UTC).date()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", default=str(ROOT / f"benchmarks/results/gpu-{today}"), help="a folder")
    parser.add_argument("--minutes", type=float, default=10, help="for all of it")
    parser.add_argument("--python", default=sys.executable, help="one that has the frameworks, pytest and NumPy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few tests, to try the path")
    return parser.parse_args()


def conditions(options: argparse.Namespace, versions: dict[str, str]) -> dict[str, Any]:
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": options.device,
        "gpu": gpu_model() if options.device == "cuda" else None,
        "driver": gpu_driver() if options.device == "cuda" else None,
        "processor": processor_model(),
        "versions": {name: versions[name] for name in ("python", *PACKAGES) if name in versions},
        "minutes": options.minutes,
        "quick": options.quick,
    }


def versions_of(python: str) -> dict[str, str]:
    """Of all packages that a Python has, and its own; imports none of them."""
    code = (
        "import json, platform, importlib.metadata as m\n"
        "names = {d.metadata['Name']: d.version for d in m.distributions() if d.metadata['Name']}\n"
        "found = {name.lower().replace('_', '-'): version for name, version in names.items()}\n"
        "print(json.dumps({**found, 'python': platform.python_version()}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def missing(names: Iterable[str], versions: dict[str, str]) -> str:
    """Which packages are not installed, as a reason; "" where all are."""
    absent = [name for name in names if name not in versions]
    return f"{' and '.join(absent)} not installed" if absent else ""


def notes_on(versions: dict[str, str]) -> list[str]:
    """What is not installed, and what that means."""
    groups = {"everything": NEEDED, "tests": ("pytest", "pytest-timeout"), **FRAMEWORKS}
    notes = [f"{what}: not run, {lack}" for what, names in groups.items() if (lack := missing(names, versions))]
    if "blake3" not in versions:
        notes.append("blake3 not installed: a stand-in hashes the checkpoints that the parts write for themselves")
    return notes


# -- what there is to run ---------------------------------------------------------------------------------------------


def make_parts(options: argparse.Namespace, versions: dict[str, str], folder: Path) -> Iterable[Part]:
    where = dict(ON_GPU if options.device == "cuda" else ON_CPU)
    if "blake3" not in versions:
        where["PYTHONPATH"] = str(write_stand_in(folder))
    yield from parts_of_tests(options, versions, where, folder)
    yield from benchmark_parts(options, versions, where, folder)


def write_stand_in(folder: Path) -> Path:
    """The folder of a module `blake3` with another hash of the same length."""
    place = folder / DETAILS / "stand-ins"
    place.mkdir(exist_ok=True)
    (place / "blake3.py").write_text(STAND_IN)
    return place


def parts_of_tests(options, versions: dict[str, str], where: dict[str, str], folder: Path) -> Iterable[Part]:
    """A part for each file that has tests with the marker."""
    files = gpu_test_files() if not options.quick else {backend: [quick_test(backend)] for backend in FRAMEWORKS}
    flags = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_TO_COMPILE}".strip()
    for group, paths in files.items():
        lacks = missing((*NEEDED_BY_TESTS, *FRAMEWORKS.get(group, ())), versions)
        for path in paths:
            name = f"tests {Path(path).stem.removeprefix('test_')}"
            command = [options.python, "-m", "pytest", "-v", "-p", "no:cacheprovider", path]
            command += [f"--timeout={TEST_SECONDS}", "--backends", group if group in FRAMEWORKS else "torch"]
            command += ["-m", "gpu" if options.device == "cuda" else "not gpu and not slow and not hub"]
            part = Part(name, command, 1.0, {**where, **IN_TESTS, "XLA_FLAGS": flags}, "tests", lacks)
            command.append(f"--junitxml={part.file(folder, 'xml')}")
            yield part


def gpu_test_files() -> dict[str, list[str]]:
    """Files with the marker, by the backend whose folder they are in; "all" for the others."""
    files: dict[str, list[str]] = {backend: [] for backend in FRAMEWORKS}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if path.parent != ROOT / "tests/benchmarks" and "mark.gpu" in path.read_text(encoding="utf-8"):
            group = path.relative_to(ROOT / "tests").parts[0]
            files.setdefault(group if group in FRAMEWORKS else "all", []).append(str(path))
    return files


def quick_test(backend: str) -> str:
    return str(ROOT / "tests" / backend / f"test_{backend}_attention.py")


def benchmark_parts(options, versions: dict[str, str], where: dict[str, str], folder: Path) -> Iterable[Part]:
    for name, share, arguments in quick_benchmarks() if options.quick else gpu_benchmarks():
        command = [options.python, str(ROOT / "benchmarks/attention.py"), "--device", options.device, *arguments]
        part = Part(name, command, share, where, "benchmark", missing(NEEDED, versions))
        command += [f"--{what}={part.file(folder, ending)}" for what, ending in OUTPUTS]
        command.append(f"--plot={folder / name}.png")
        yield part


OUTPUTS = (("output", "json"), ("markdown", "md"))


def gpu_benchmarks() -> list[tuple[str, float, list[str]]]:
    """What decides the goals, first: a process starts and compiles for half a minute, and there are a few minutes."""
    against = ["--contestants", "torch,transformers,flax", "--dtypes", "bfloat16"]
    training = ["--parts", "training", "--lengths", "2048", "--runs", "5", "--seconds", "3", *against]
    alone = ["--parts", "attention", "--lengths", "2048", "--runs", "20", "--seconds", "3"]
    inference = ["--parts", "inference", "--lengths", "1024", "--new-tokens", "129", "--runs", "3", *against]
    return [
        ("training-1.3b", 0.35, ["--size", "opt-1.3b", "--batches", "8", *training]),
        ("attention-64", 0.3, ["--size", "opt-1.3b", "--batches", "8", "--dtypes", "bfloat16", *alone]),
        ("inference-125m", 0.4, ["--batches", "1,8", *inference]),
        ("attention-80", 0.3, ["--size", "opt-2.7b", "--batches", "8", "--dtypes", "bfloat16", *alone]),
        ("attention-128", 0.4, ["--size", "opt-6.7b", "--batches", "8", "--dtypes", "bfloat16", *alone]),
        ("decoding", 0.3, ["--parts", "decoding", "--size", "opt-1.3b", "--batches", "8", "--lengths", "128,2048"]),
        ("attention-float32", 0.5, ["--size", "opt-1.3b", "--batches", "2", "--dtypes", "float32", *alone]),
        ("training-125m", 1.0, ["--batches", "1,8", *training]),
    ]


def quick_benchmarks() -> list[tuple[str, float, list[str]]]:
    tiny = ["--size", "opt-tiny", "--batches", "1", "--lengths", "32", "--runs", "1", "--contestants", "torch"]
    return [(name, 0.6, ["--parts", name, *tiny, "--new-tokens", "5"]) for name in ("attention", "training")]


# -- running ----------------------------------------------------------------------------------------------------------


def run_parts(parts: list[Part], folder: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """Tests side by side, as many as there are processors for, in their share of the time; then benchmarks in turn."""
    tests = [part for part in parts if part.kind == "tests"]
    until = time.monotonic() + TESTS_SHARE * (deadline - time.monotonic())
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // PROCESSORS_A_TEST)) as pool:
        yield from pool.map(lambda part: run_part(part, folder, until), tests)
    for part in parts:
        if part.kind == "benchmark":
            yield run_part(part, folder, deadline)


def run_part(part: Part, folder: Path, deadline: float) -> dict[str, Any]:
    """A row of the result; `status` is "passed" (of tests), "ok", "not run" or "failed"."""
    for ending in ("json", "md", "xml", "log"):
        part.file(folder, ending).unlink(missing_ok=True)  # of an earlier run
    left = deadline - time.monotonic()
    if part.lacks:
        return row(part, "not run", part.lacks)
    if left < LEAST_SECONDS:
        return row(part, "not run", "no time was left")
    limit = max(LEAST_SECONDS, part.share * left)
    start = time.monotonic()
    judged = run_tests(part, folder, limit) if part.kind == "tests" else run_benchmark(part, folder, limit)
    if judged["status"] not in ("passed", "ok"):
        judged["log_tail"] = part.file(folder, "log").read_text(errors="replace")[-LOG_CHARACTERS:]
    seconds = round(time.monotonic() - start, 1)
    return {**judged, "seconds": seconds, "limit_seconds": round(limit, 1), "command": " ".join(part.command)}


def run_benchmark(part: Part, folder: Path, limit: float) -> dict[str, Any]:
    command = [*part.command, f"--budget={max(1.0, limit - MARGIN_SECONDS):.0f}"]
    return judge_benchmark(part, folder, run_process(command, part.environment, part.file(folder, "log"), limit))


def run_tests(part: Part, folder: Path, limit: float) -> dict[str, Any]:
    """Those behind a test that takes its process down run in another one."""
    until = time.monotonic() + limit
    died: list[dict[str, Any]] = []
    seen: list[str] = []
    while True:
        command = [*part.command, *(f"--deselect={name}" for name in seen)]
        code = run_process(command, part.environment, part.file(folder, "log"), until - time.monotonic())
        judged = judge_tests(part, folder, code)
        more = [name for name in judged.get("seen", ()) if name not in seen]
        if code is None or not more or until - time.monotonic() < LEAST_SECONDS:
            return with_those_that_died(judged, died)
        died.append(judged)
        seen += more


def with_those_that_died(last: dict[str, Any], died: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the processes for the same tests."""
    if not died:
        return last
    everything = [*died, last]
    counts = Counter()
    for judged in everything:
        counts.update(judged.get("counts", {}))
    reasons = [judged["reason"] for judged in everything if judged["reason"]]
    failed = [name for judged in everything for name in judged.get("failed", ())]
    return {**last, "status": "failed", "reason": "; ".join(reasons), "counts": dict(counts), "failed": failed}


def run_process(command: list[str], environment: dict[str, str], log: Path, limit: float) -> int | None:
    """The exit code; None where it was stopped, with all that it had started, at the end of its time."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"), environment.get("PYTHONPATH"))))
    always = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment = {**os.environ, **environment, **always}
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def row(part: Part, status: str, reason: str = "", **more: Any) -> dict[str, Any]:
    return {"name": part.name, "kind": part.kind, "status": status, "reason": reason, **more}


def judge_tests(part: Part, folder: Path, code: int | None) -> dict[str, Any]:
    """By pytest's exit code and its counts; where every test was skipped, none has passed."""
    file = part.file(folder, "xml")
    if code is None:
        return judge_stopped_tests(part, folder, "stopped at the end of its time")
    if not file.exists():
        return judge_stopped_tests(part, folder, f"pytest ended with {code}")
    suite = next(ElementTree.parse(file).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    names = [
        f"{case.get('classname')}::{case.get('name')}: {bad[0].get('message', '')[:MESSAGE_CHARACTERS]}"
        for case in suite.iter("testcase")
        if (bad := [*case.iter("failure"), *case.iter("error")])
    ]
    if code == 0 and counts["passed"]:
        return row(part, "passed", counts=counts, failed=names)
    reason = f"pytest ended with {code}" if code else "every test was skipped"
    return row(part, "failed" if code else "not run", reason, counts=counts, failed=names)


def judge_stopped_tests(part: Part, folder: Path, reason: str) -> dict[str, Any]:
    """Of a process that hung or crashed, by what pytest had printed."""
    lines = part.file(folder, "log").read_text(errors="replace").splitlines()
    found = [match for line in lines if (match := OUTCOME.match(line.rstrip()))]
    outcomes = Counter(match["outcome"] for match in found)
    unfinished = [match["test"] for match in found if match["outcome"] is None][-1:]
    counts = {"tests": len(found), "failures": outcomes["FAILED"], "errors": outcomes["ERROR"]}
    counts |= {"skipped": outcomes["SKIPPED"], "passed": outcomes["PASSED"]}
    reason += f", in {unfinished[0]}" if unfinished else f": {last_line(folder, part)}"
    failed = [match["test"] for match in found if match["outcome"] in ("FAILED", "ERROR")]
    return row(part, "failed", reason, counts=counts, failed=failed, seen=[match["test"] for match in found])


def judge_benchmark(part: Part, folder: Path, code: int | None) -> dict[str, Any]:
    """With the document as far as it was written: a benchmark that was stopped keeps its cells."""
    file = part.file(folder, "json")
    document = json.loads(file.read_text()) if file.exists() else None
    if code is None:
        return row(part, "failed", "stopped at the end of its time", document=document)
    if code or not document:
        return row(part, "failed", f"ended with {code}: {last_line(folder, part)}", document=document)
    if not any(cell["status"] == "ok" for cell in document["results"]):
        reasons = dict.fromkeys(cell["reason"] for cell in document["results"])
        return row(part, "not run", "; ".join(reasons), document=document)
    return row(part, "ok", document=document)


def last_line(folder: Path, part: Part) -> str:
    lines = part.file(folder, "log").read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it wrote nothing"


# -- report -----------------------------------------------------------------------------------------------------------


def write(document: dict[str, Any], folder: Path) -> None:
    document["goals"] = [{**goal._asdict(), "verdict": goal.verdict} for goal in goals(document)]
    (folder / "results.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    (folder / "results.md").write_text(to_markdown(document, folder) + "\n")


class Goal(NamedTuple):
    """What a cell should reach on a GPU."""

    what: str
    value: float | None  # None where it was not measured
    wanted: float
    at_least: bool = False  # else at most

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if (self.value >= self.wanted if self.at_least else self.value <= self.wanted) else "NOT met"


def goals(document: dict[str, Any]) -> Iterator[Goal]:
    """Those of every cell of ours, beside the same cell of transformers."""
    for measured in (part["document"] for part in document["parts"] if part.get("document")):
        peers = {case(cell): cell for cell in measured["results"] if cell["contestant"] not in FRAMEWORKS}
        for cell in measured["results"]:
            if cell["contestant"] in FRAMEWORKS:
                kind = f"{cell['part']} {cell['contestant']} {measured['size']} {cell['dtype']}"
                for goal in goals_of(cell, peers.get(case(cell))):
                    yield goal._replace(what=f"{kind} {cell['batch']} x {cell['length']}: {goal.what}")


def goals_of(cell: dict[str, Any], peer: dict[str, Any] | None) -> Iterator[Goal]:
    figures = cell["results"]
    ours, theirs = figures.get("sdpa", {}), peer["results"].get("sdpa", {}) if peer else {}
    if cell["part"] == "attention":
        libraries = [name for name in figures if name.startswith("library:") or name == "cudnn"]
        best = min(filter(None, (figures[name].get("both_seconds") for name in libraries)), default=None)
        for name in ("sdpa", *(["pallas"] if "pallas" in figures else [])):
            seconds = figures.get(name, {}).get("both_seconds")
            yield Goal(f"{name} by the best kernel of a library", ratio(seconds, best), LIBRARY_RATIO)
    if cell["part"] == "training":
        yield Goal("share of the matrix rate", ours.get("matrix_rate_share"), RATE_SHARE, at_least=True)
    for key in {"training": ("step_seconds",), "inference": ("step_seconds", "prefill_seconds")}.get(cell["part"], ()):
        yield Goal(f"{key} by that of transformers", ratio(ours.get(key), theirs.get(key)), PEER_RATIO)


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def case(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[key] for key in ("part", "dtype", "batch", "length"))


def to_markdown(document: dict[str, Any], folder: Path) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    where = f"{document['gpu']}, driver {document['driver']}" if document["gpu"] else f"no GPU: {document['processor']}"
    lines = [f"{where}; {versions}; commit {document['commit']}, {document['date']}", ""]
    lines += [f"- {note}" for note in document.get("notes", ())] + [""]
    lines += ["| part | status | passed | failed | skipped | seconds | |", "|---|---|---|---|---|---|---|"]
    for part in document["parts"]:
        counts = part.get("counts", {})
        failed = counts["failures"] + counts["errors"] if counts else ""
        numbers = [counts.get("passed", ""), failed, counts.get("skipped", ""), part.get("seconds", "")]
        lines.append("| " + " | ".join(map(str, [part["name"], part["status"], *numbers, part["reason"]])) + " |")
    found = list(goals(document))
    lines += ["", "| goal | value | wanted | |", "|---|---|---|---|"] if found else []
    for goal in found:
        value, sign = "" if goal.value is None else f"{goal.value:.2f}", ">=" if goal.at_least else "<="
        lines.append(f"| {goal.what} | {value} | {sign} {goal.wanted} | {goal.verdict} |")
    for part in document["parts"]:
        lines += [f"\n- {name}" for name in part.get("failed", [])[:20]]
        tables = folder / DETAILS / f"{part['name']}.md"
        if part["kind"] == "benchmark" and tables.exists():
            lines += ["", f"## {part['name']}", "", tables.read_text()]
            lines += [f"![]({part['name']}.png)"] if (folder / f"{part['name']}.png").exists() else []
    return "\n".join(lines)


def short(part: dict[str, Any]) -> dict[str, Any]:
    """Without the cells, for the last line of stdout."""
    return {key: value for key, value in part.items() if key != "document"}


if __name__ == "__main__":
    sys.exit(main())
