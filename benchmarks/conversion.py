"""Speed of converting a checkpoint, beside `cp` of the same bytes, and memory of converting one of opt-6.7b's shape.

    python benchmarks/conversion.py --repeats 7 --output conversion.json

Speed: random float32 weights of opt-350m's shape are converted to each format with and without reading them again, in
turn with `cp`, so that other work on the machine falls on all. `cp` does not wait for the disk and `opt-zoo convert`
does, hence both are timed with and without that wait. Files lie in the page cache: it is the software that is measured.

Memory: a float16 checkpoint of zeros, a file with a hole, is converted in a process that is watched from here. Bound:
the largest tensor + 300 MB of anonymous memory. Read from /proc, on Linux alone. The last line is one JSON document.
"""

import argparse
import contextlib
import json
import logging
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from loading import SAMPLING_SECONDS  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from conversion import open_checkpoint, write_checkpoint  # noqa: E402
from conversion.formats import FORMATS, places  # noqa: E402
from conversion.layout import stored_shape  # noqa: E402
from conversion.safetensors_file import PlannedTensor, write_file  # noqa: E402
from opt_core import OPTConfig  # noqa: E402
from opt_core.schema import parameter_count  # noqa: E402
from opt_core.synthetic import random_tensors  # noqa: E402
from opt_zoo.environment import commit, describe_environment, processor_model  # noqa: E402

TARGET_RATIO = {"safetensors": 0.6}  # of the speed of `cp`, verified or not
TRANSPOSING_RATIO = 0.4
ALLOWED_BYTES = 300_000_000  # of memory beside the largest tensor
COPY = "cp"


class Case(NamedTuple):
    """What is timed: `cp`, or a conversion."""

    what: str  # "cp" or a format
    verified: bool
    synced: bool


class Sample(NamedTuple):
    seconds: float
    cpu_seconds: float  # of all threads, and of the system for them
    load_average: float  # of one minute, before


def main() -> None:
    options = parse_options()
    logging.disable(logging.WARNING)  # of matrices of zeros
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        speed = measure_speed(Path(folder), options) if options.repeats else []
        memory = measure_memory(Path(folder), options) if options.memory_formats else []
    document = {"benchmark": "conversion", **describe_conditions(options), "speed": speed, "memory": memory}
    print_tables(document)
    if options.output:
        Path(options.output).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def parse_options() -> argparse.Namespace:
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--formats", type=names, default=["safetensors", "flax-msgpack", "tf-h5"])
    parser.add_argument("--size", default="opt-350m", help="a preset of OPTConfig, for speed")
    parser.add_argument("--repeats", type=int, default=7, help="of each row; 0: no speed")
    parser.add_argument("--memory-formats", type=names, default=["safetensors", "flax-msgpack"], help="'': no memory")
    parser.add_argument("--memory-size", default="opt-6.7b")
    parser.add_argument("--memory-layers", type=int, help="fewer layers, of the same width, for a small disk")
    parser.add_argument("--folder", help="where the files are made (default: that of temporary files)")
    parser.add_argument("--output", help="a file for the JSON document")
    return parser.parse_args()


# -- speed ------------------------------------------------------------------------------------------------------------


def measure_speed(folder: Path, options: argparse.Namespace) -> list[dict[str, object]]:
    config, source = config_of(options.size), folder / "source"
    write_checkpoint(source, config, dict(random_tensors(config)))
    cases = list(make_cases(config, options.formats))
    samples: dict[Case, list[Sample]] = {case: [] for case in cases}
    for turn in range(options.repeats):
        for case in cases:
            sample = measure_once(case, source, folder / "target")
            samples[case].append(sample)
            text = f"{' '.join(map(str, case))}: {sample.seconds:.3f} s, {sample.cpu_seconds:.3f} s of CPU"
            print(f"{turn + 1}/{options.repeats} {text}", file=sys.stderr)
    nbytes = (source / "model.safetensors").stat().st_size
    return [summarise(case, samples, nbytes) for case in cases]


def config_of(size: str, layers: int | None = None) -> OPTConfig:
    config = OPTConfig.preset(size)
    return config.replace(num_hidden_layers=layers) if layers else config


def make_cases(config: OPTConfig, formats: list[str]) -> Iterator[Case]:
    for synced in (False, True):
        yield Case(COPY, False, synced)
        for format in formats:
            for verified in (False, True):
                yield Case(format, verified, synced)


def measure_once(case: Case, source: Path, target: Path) -> Sample:
    load_average, start, cpu_start = os.getloadavg()[0], time.perf_counter(), cpu_seconds()
    if case.what == COPY:
        copy(source / "model.safetensors", target, synced=case.synced)
    else:
        with contextlib.nullcontext() if case.synced else without_sync():
            convert(source, target, case.what, verify=case.verified)
    sample = Sample(time.perf_counter() - start, cpu_seconds() - cpu_start, load_average)
    shutil.rmtree(target)
    os.sync()  # so that nobody writes for another
    return sample


def cpu_seconds() -> float:
    """Of this process and its children."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def copy(source: Path, target: Path, *, synced: bool) -> None:
    target.mkdir()
    subprocess.run(["cp", source, target / source.name], check=True)
    if synced:
        subprocess.run(["sync", target / source.name, target], check=True)


def convert(source: Path, target: Path, format: str, *, verify: bool = True) -> None:
    with open_checkpoint(source) as checkpoint:
        write_checkpoint(target, checkpoint.config, checkpoint, format=format, verify=verify)


@contextlib.contextmanager
def without_sync() -> Iterator[None]:
    fsync = os.fsync
    os.fsync = lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = fsync


def summarise(case: Case, samples: dict[Case, list[Sample]], nbytes: int) -> dict[str, object]:
    """One row: medians, and the median of the ratios to the `cp` of the same turn."""
    own, copies = samples[case], samples[Case(COPY, False, case.synced)]
    seconds = [sample.seconds for sample in own]
    ratio = statistics.median(copied.seconds / sample.seconds for copied, sample in zip(copies, own, strict=True))
    target = None if case.what == COPY else TARGET_RATIO.get(case.what, TRANSPOSING_RATIO)
    return {
        **case._asdict(),
        "bytes": nbytes,
        "seconds": round(statistics.median(seconds), 3),
        "seconds_min": round(min(seconds), 3),
        "seconds_max": round(max(seconds), 3),
        "cpu_seconds": round(statistics.median(sample.cpu_seconds for sample in own), 3),
        "ratio_to_cp": round(ratio, 3),
        "ratio_of_medians": round(
            statistics.median(copied.seconds for copied in copies) / statistics.median(seconds), 3
        ),
        "load_average": [round(sample.load_average, 1) for sample in own],
        "target_ratio": target,
        "target_met": None if target is None else ratio >= target,
    }


# -- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(folder: Path, options: argparse.Namespace) -> list[dict[str, object]]:
    config = config_of(options.memory_size, options.memory_layers)
    largest = write_zeros(folder / "zeros", config)
    rows = []
    for format in options.memory_formats:
        rows.append(convert_watched(folder / "zeros", folder / "target", format, largest))
        shutil.rmtree(folder / "target")
        print(json.dumps(rows[-1]), file=sys.stderr)
    return [{"size": options.memory_size, "layers": config.num_hidden_layers, **row} for row in rows]


def write_zeros(folder: Path, config: OPTConfig) -> int:
    """A float16 checkpoint in the published layout whose weights are a hole in the file; the largest tensor's bytes."""
    folder.mkdir()
    config.replace(torch_dtype="float16", architectures=["OPTForCausalLM"]).to_json(folder)
    tensors = [
        PlannedTensor(place.name, "float16", stored_shape(place.layout))
        for place in places(FORMATS["safetensors"], config, "causal-lm").values()
    ]
    with open(folder / "model.safetensors", "wb") as file:
        write_file(file, tensors, lambda file, tensor: file.seek(tensor.nbytes, os.SEEK_CUR))
        file.truncate()
    return max(tensor.nbytes for tensor in tensors)


def convert_watched(source: Path, target: Path, format: str, largest: int) -> dict[str, object]:
    command = [sys.executable, __file__, "--convert-once", str(source), str(target), format]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()  # imported
        with Watcher(process.pid) as memory:
            seconds = json.loads(process.stdout.readline() or "null")
    if seconds is None:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {
        "format": format,
        "verified": True,
        "bytes": (source / "model.safetensors").stat().st_size,
        "largest_tensor_bytes": largest,
        "peak_anonymous_bytes": memory.peaks["RssAnon"],
        "anonymous_bytes_before": memory.before["RssAnon"],
        "peak_resident_bytes": memory.peaks["VmRSS"],
        "allowed_bytes": largest + ALLOWED_BYTES,
        "seconds": round(seconds, 1),
        "target_met": memory.peaks["RssAnon"] <= largest + ALLOWED_BYTES,
    }


def convert_once(source: str, target: str, format: str) -> None:
    """One process: a line once imported, and the seconds once done."""
    logging.disable(logging.WARNING)
    print("imported", flush=True)
    time.sleep(20 * SAMPLING_SECONDS)
    start = time.perf_counter()
    convert(Path(source), Path(target), format)
    print(time.perf_counter() - start, flush=True)
    time.sleep(20 * SAMPLING_SECONDS)


class Watcher:
    """The peaks of a process's anonymous memory, and of all its memory, pages of mapped files among it."""

    def __init__(self, pid: int):
        self._status = Path(f"/proc/{pid}/status")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watcher":
        self.before = self.peaks = self._bytes()
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLING_SECONDS):
            now = self._bytes()
            self.peaks = {key: max(value, now.get(key, 0)) for key, value in self.peaks.items()}

    def _bytes(self) -> dict[str, int]:
        lines = (line.split() for line in self._status.read_text().splitlines())
        return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("RssAnon:", "VmRSS:")}


# -- report -----------------------------------------------------------------------------------------------------------


def describe_conditions(options: argparse.Namespace) -> dict[str, object]:
    config = config_of(options.size)
    return {
        "size": options.size,
        "parameters": parameter_count(config),
        **describe_environment([]),
        "cpu": processor_model(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "commit": commit(),
        "repeats": options.repeats,
    }


def print_tables(document: dict) -> None:
    console = Console(width=140)
    speed = Table(title=f"{document['size']}, float32, {document['cores_allowed']} cores, {document['cpu']}")
    for column in ("to", "verified", "synced", "seconds", "min", "max", "CPU", "of cp", "target", ""):
        speed.add_column(column)
    met: Callable[[object], str] = {None: "", True: "met", False: "MISSED"}.get  # type: ignore[assignment]
    for row in document["speed"]:
        numbers = (row[name] for name in ("seconds", "seconds_min", "seconds_max", "cpu_seconds", "ratio_to_cp"))
        words = (row["what"], *("yes" if row[name] else "no" for name in ("verified", "synced")))
        speed.add_row(
            *words, *(f"{number:.2f}" for number in numbers), str(row["target_ratio"]), met(row["target_met"])
        )
    console.print(speed)
    memory = Table(title="memory in MB, verified")
    for column in ("size", "layers", "to", "largest tensor", "anonymous", "allowed", "resident", "seconds", ""):
        memory.add_column(column)
    for row in document["memory"]:
        names = ("largest_tensor_bytes", "peak_anonymous_bytes", "allowed_bytes", "peak_resident_bytes")
        sizes = (f"{row[name] / 1e6:.0f}" for name in names)
        words = (row["size"], str(row["layers"]), row["format"])
        memory.add_row(*words, *sizes, f"{row['seconds']:.0f}", met(row["target_met"]))
    console.print(memory)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert-once"]:
        convert_once(*sys.argv[2:])
    else:
        main()
