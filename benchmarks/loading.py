"""Seconds and memory of `from_pretrained` on checkpoints of opt-125m's shape, against those of transformers.

    python benchmarks/loading.py --backends torch,tf,flax --dtypes float32,bfloat16 --repeats 5 --output loading.json

Random weights are written twice: as this project writes them, every tensor at a multiple of 64 bytes, and as the
safetensors package does, where no tensor is: most files of the hub are of that kind. Each measurement runs in a process
of its own, the frameworks in turn, so that other work on the machine falls on all of them. The clock starts when the
framework and the model's class are imported. Mapped pages may be read as late as the first forward pass, which is why
that is timed too; the second one shows how much of the first was compilation and pages.

Files are in the page cache: it is the software that is measured, not the disk. Memory is read from /proc, on Linux
alone. The last line is one JSON document.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from conversion import write_checkpoint  # noqa: E402
from opt_core import OPTConfig  # noqa: E402
from opt_core.schema import parameter_count, published_name  # noqa: E402
from opt_core.synthetic import random_tensors  # noqa: E402
from opt_zoo.backends import BACKENDS  # noqa: E402
from opt_zoo.environment import commit, describe_environment, processor_model  # noqa: E402

PEER = "transformers"
CLASSES = {name: (backend.package, backend.causal_lm) for name, backend in BACKENDS.items()}
CLASSES[PEER] = (PEER, "OPTForCausalLM")
TARGET_SECONDS = {"torch": 0.5, "flax": 0.5, "tf": 1.5}  # opt-125m, float32 stored and asked for, two cores
TARGET_COPIES = 1.0  # beyond the mapped file, at the peak
OTHER_BYTES = 64 << 20  # that a framework may take for itself: TensorFlow takes 45 MB where no weight is copied
NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
PROMPT_TOKENS = 8
SAMPLING_SECONDS = 0.002
SETTINGS = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}


class Case(NamedTuple):
    """What is loaded, and by whom."""

    backend: str
    layout: str  # "aligned" or "packed"
    stored: str
    asked: str


class Sample(NamedTuple):
    """One process. Bytes are of anonymous memory, beyond what was there before the load."""

    import_seconds: float
    load_seconds: float
    first_forward_seconds: float
    second_forward_seconds: float
    peak_bytes: int
    load_average: float  # of one minute, before the process began


def main() -> None:
    options = parse_options()
    config = OPTConfig.preset(options.size)
    with tempfile.TemporaryDirectory() as folder:
        folders = write_folders(Path(folder), config, options.dtypes)
        cases = list(make_cases([*options.backends, PEER] if options.peer else options.backends, options.dtypes))
        samples: dict[Case, list[Sample]] = {case: [] for case in cases}
        for turn in range(options.repeats):
            for case in cases:
                sample = measure_in_process(case, folders[case.layout, case.stored])
                samples[case].append(sample)
                print(f"{turn + 1}/{options.repeats} {' '.join(case)}: {sample.load_seconds:.3f} s", file=sys.stderr)
    results = [summarise(case, samples[case], config) for case in cases]
    document = {"benchmark": "loading", "size": options.size, **describe_conditions(options), "results": results}
    print_table(document)
    if options.output:
        Path(options.output).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def parse_options() -> argparse.Namespace:
    names = lambda text: text.split(",")  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backends", type=names, default=list(BACKENDS), help="of torch, tf, flax; all by default")
    parser.add_argument("--dtypes", type=names, default=["float32", "bfloat16"], help="stored and asked for")
    parser.add_argument("--size", default="opt-125m", help="a preset of OPTConfig")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each row of the table")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without transformers")
    parser.add_argument("--output", help="a file for the JSON document")
    return parser.parse_args()


def make_cases(backends: list[str], dtypes: list[str]) -> Iterator[Case]:
    """Both layouts in the stored dtype; changes of dtype from the layout that users meet."""
    for stored in dtypes:
        for asked in dtypes:
            for layout in ("aligned", "packed") if asked == stored else ("packed",):
                for backend in backends:
                    yield Case(backend, layout, stored, asked)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def write_folders(parent: Path, config: OPTConfig, dtypes: list[str]) -> dict[tuple[str, str], Path]:
    """Checkpoints of the same random values, by (layout, dtype)."""
    folders = {}
    for dtype in dtypes:
        tensors = {name: values.astype(NUMPY_DTYPES[dtype]) for name, values in random_tensors(config)}
        for layout in ("aligned", "packed"):
            folder = folders[layout, dtype] = parent / f"{layout}-{dtype}"
            write_checkpoint(folder, config, tensors)
            if layout == "packed":
                write_packed(folder / "model.safetensors", tensors)
    return folders


def write_packed(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Replaces a file by one of the safetensors package, whose data start 8 bytes beyond a multiple of 64.

    The package pads the header to a multiple of 8: by chance one file in eight is aligned, which padding rules out.
    """
    from safetensors.numpy import save_file

    published = {published_name(name, "causal-lm"): values for name, values in tensors.items()}
    for padding in range(0, 64, 8):
        save_file(published, path, metadata={"format": "pt", "padding": "x" * padding})
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        if start % 64 == 8:
            return
    raise AssertionError("the safetensors package does not pad its header to 8 bytes")


# -- one measurement --------------------------------------------------------------------------------------------------


def measure_in_process(case: Case, folder: Path) -> Sample:
    """Runs `load_once` in a new process and watches its memory from here, where that takes none of its time."""
    load_average = os.getloadavg()[0]
    command = [sys.executable, __file__, "--load-once", case.backend, str(folder), case.asked]
    with tempfile.TemporaryFile("w+") as errors:
        pipes = dict(stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **SETTINGS})
        process = subprocess.Popen(command, **pipes)
        lines = iter(process.stdout)
        imported = json.loads(next(lines, "{}"))
        with PeakMemory(process.pid) as memory:
            next(lines, None)
        finished = json.loads(next(lines, "{}"))
        if process.wait():
            errors.seek(0)
            raise SystemExit(f"{errors.read()}{' '.join(command)} ended with {process.returncode}")
    return Sample(**imported, **finished, peak_bytes=memory.growth, load_average=load_average)


def load_once(backend: str, folder: str, dtype: str) -> None:
    """One process: three lines of stdout, once imported, once loaded, at the end."""
    package, class_name = CLASSES[backend]
    start = time.perf_counter()
    model_class = getattr(importlib.import_module(package), class_name)
    print(json.dumps({"import_seconds": time.perf_counter() - start}), flush=True)
    time.sleep(10 * SAMPLING_SECONDS)  # for the watcher to begin
    start = time.perf_counter()
    model = model_class.from_pretrained(folder, dtype=dtype)
    load_seconds = time.perf_counter() - start
    time.sleep(2 * SAMPLING_SECONDS)
    print("loaded", flush=True)
    seconds = [forward_seconds(backend, model) for _ in range(2)]
    names = ("load_seconds", "first_forward_seconds", "second_forward_seconds")
    print(json.dumps(dict(zip(names, (load_seconds, *seconds), strict=True))), flush=True)


def forward_seconds(backend: str, model) -> float:
    tokens = np.arange(4, 4 + PROMPT_TOKENS)[None]
    if backend in ("torch", PEER):
        torch = importlib.import_module("torch")
        tokens = torch.from_numpy(tokens)
        model.requires_grad_(False)
    start = time.perf_counter()
    logits = model(tokens).logits
    if backend == "flax":
        logits.block_until_ready()
    elif backend == "tf":
        logits.numpy()
    return time.perf_counter() - start


class PeakMemory:
    """Watches the anonymous memory of a process: mapped pages of a file are not in it, written copies are."""

    def __init__(self, pid: int):
        self._status = Path(f"/proc/{pid}/status")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PeakMemory":
        self._before = self._peak = self._anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self._peak - self._before

    def _watch(self) -> None:
        while not self._done.wait(SAMPLING_SECONDS):
            self._peak = max(self._peak, self._anonymous_bytes())

    def _anonymous_bytes(self) -> int:
        lines = self._status.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)  # 0: it ended


# -- report -----------------------------------------------------------------------------------------------------------


def summarise(case: Case, samples: list[Sample], config: OPTConfig) -> dict[str, object]:
    """One row: medians, the range of the load, and the peak in units of the loaded weights' bytes."""
    weight_bytes = parameter_count(config) * np.dtype(NUMPY_DTYPES[case.asked]).itemsize
    median = {name: statistics.median(getattr(sample, name) for sample in samples) for name in Sample._fields}
    seconds = [sample.load_seconds for sample in samples]
    peak_bytes = max(sample.peak_bytes for sample in samples)
    return {
        **case._asdict(),
        "weight_bytes": weight_bytes,
        **{name: round(value, 4) for name, value in median.items() if name.endswith("_seconds")},
        "load_seconds_min": round(min(seconds), 4),
        "load_seconds_max": round(max(seconds), 4),
        "peak_copies": round(peak_bytes / weight_bytes, 3),
        "load_average": [round(sample.load_average, 2) for sample in samples],
        "target_met": meets_target(case, median["load_seconds"], peak_bytes, weight_bytes),
    }


def meets_target(case: Case, load_seconds: float, peak_bytes: int, weight_bytes: int) -> bool | None:
    """None where no target was set."""
    if case.backend not in TARGET_SECONDS or (case.stored, case.asked) != ("float32", "float32"):
        return None
    return load_seconds <= TARGET_SECONDS[case.backend] and peak_bytes <= TARGET_COPIES * weight_bytes + OTHER_BYTES


def describe_conditions(options: argparse.Namespace) -> dict[str, object]:
    backends = [BACKENDS[name] for name in options.backends]
    environment = describe_environment(backends)
    if options.peer:
        environment["versions"][PEER] = importlib.metadata.version(PEER)
    return {
        **environment,
        "cpu": processor_model(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "commit": commit(),
        "repeats": options.repeats,
        "core_import_seconds": round(core_import_seconds(), 4),
    }


def core_import_seconds() -> float:
    """The median of five processes."""
    code = "import time; t = time.perf_counter(); import opt_core; print(time.perf_counter() - t)"
    run = lambda: subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: E731
    return statistics.median(float(run().stdout) for _ in range(5))


def print_table(document: dict) -> None:
    table = Table(title=f"from_pretrained, {document['size']}, {document['cores_allowed']} cores, {document['cpu']}")
    for column in Case._fields:
        table.add_column(column)
    for column in ("seconds", "min", "max", "peak*", "forward", "again", "import", "load+", "target"):
        table.add_column(column, justify="right")
    for row in document["results"]:
        seconds = ("load_seconds", "load_seconds_min", "load_seconds_max")
        later = ("first_forward_seconds", "second_forward_seconds", "import_seconds")
        table.add_row(
            *(row[name] for name in Case._fields),
            *(f"{row[name]:.3f}" for name in seconds),
            f"{row['peak_copies']:.2f}",
            *(f"{row[name]:.3f}" for name in later),
            f"{min(row['load_average']):.1f}-{max(row['load_average']):.1f}",
            {None: "", True: "met", False: "MISSED"}[row["target_met"]],
        )
    console = Console(width=140)
    console.print(table)
    console.print("* anonymous memory at the peak of loading, in units of the loaded weights; + load average before")
    console.print(f"import opt_core: {document['core_import_seconds']:.3f} s; {document['date']}, {document['commit']}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load-once"]:
        load_once(*sys.argv[2:])
    else:
        main()
