"""Eager against fused attention, alone, over a cache, in training and in generation: time and memory of each framework.

    python benchmarks/attention.py --size opt-125m --output attention.json --markdown attention.md --plot attention.png

Each cell, a contestant with a batch and a length, runs in a process of its own (attention_worker.py), the small ones
first, the implementations in turn within it; figures are medians. A cell that would need more than --max-seconds or
--max-memory, by the estimate below, or more than is left of --budget, is in the tables as not run, with the estimate,
or, of a training step, as the fused half alone where that fits; what is not installed is there too. transformers, where
it is installed, takes the training step in PyTorch beside ours. --keep takes the cells that an earlier document has in
full, of the same conditions, and measures the others.
Weights are random. The last line is one JSON document, which --output has from the first cell on. Exit code 1 where
something failed.
"""

import argparse
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.attention_report import to_markdown, write_plot
from benchmarks.attention_worker import Job, ran
from opt_core import OPTConfig
from opt_core.presets import PRESETS
from opt_core.schema import parameter_count
from opt_zoo.arguments import some_of
from opt_zoo.backends import BACKENDS, installed_backends
from opt_zoo.bench.ceilings import available_processors
from opt_zoo.bench.checkpoints import config_of, write_copies
from opt_zoo.bench.turns import WorkerError, run_process
from opt_zoo.bench.work import ITEM_BYTES, work_of
from opt_zoo.environment import (
    commit,
    describe_environment,
    gpu_model,
    has_gpu,
    processor_model,
    version_of,
)
from opt_zoo.sources import find_source

SCHEMA = "opt-zoo/attention/1"
PARTS = ("attention", "decoding", "training", "inference")
ALONE = PARTS[:2]  # without a model
PEER = "transformers"
CONTESTANTS = (*BACKENDS, PEER)
FUSED = "sdpa"
MORE_ATTENTION = {  # each says where it does not run
    "torch": ("flash_attention_2", "library:cudnn", "library:flash", "library:efficient", "flex_attention"),
    "tf": ("cudnn",),
    "flax": ("cudnn", "pallas"),
}
MORE_DECODING = {"torch": ("flash_attention_2", "library:efficient"), "tf": (), "flax": ("cudnn", "pallas")}
MORE = {"attention": MORE_ATTENTION, "decoding": MORE_DECODING}
START_SECONDS = {  # imports and compilation
    "cpu": {"torch": 6, "tf": 20, "flax": 20, PEER: 12},
    "cuda": {"torch": 10, "tf": 30, "flax": 45, PEER: 15},
}
RATE_SHARE = 0.4  # of the matrix rate, for estimates
SCORE_BYTES = {"torch": 5, "tf": 5, "flax": 10, PEER: 5}  # of a float32 score that eager keeps for gradients, about
CONDITIONS = (  # of a document, that --keep wants the same
    *("schema", "size", "heads", "head_size", "device", "fused", "new_tokens", "versions", "peers"),
    *("processor", "available_processors", "gpu"),
)


class Cell(NamedTuple):
    part: str
    contestant: str  # a backend, or PEER
    dtype: str
    batch: int
    length: int


class Need(NamedTuple):
    """An estimate, made to be above the truth more often than below it."""

    seconds: float
    nbytes: float


def main() -> int:
    options = parse_options()
    start = time.perf_counter()
    source = options.size if options.size in PRESETS else find_source(options.size, None)
    config = config_of(source)
    document: dict[str, Any] = {"schema": SCHEMA, **describe_conditions(options, config), "results": []}
    earlier = keep_earlier(options.keep, document) if options.keep else {}
    ceilings = {dtype: ceilings_of(options.device, dtype) for dtype in options.dtypes}
    document["ceilings"] = ceilings
    with tempfile.TemporaryDirectory() as parent:
        folders = {}
        if "inference" in options.parts:
            folders = write_copies(source, Path(parent), {("safetensors", dtype) for dtype in options.dtypes})
        for cell in make_cells(options, config):
            left = options.budget - (time.perf_counter() - start)
            folder = str(folders.get(("safetensors", cell.dtype), ""))
            row = earlier.get(cell) or run_cell(cell, options, config, ceilings[cell.dtype], left, folder)
            document["results"].append(row)
            print(f"{' '.join(map(str, cell))}: {row['status']} {row['reason']}", file=sys.stderr, flush=True)
            write(document, options)
    draw(document, options)
    print(to_markdown(document))
    print(json.dumps(document, allow_nan=False))
    return 1 if any(failures(row) for row in document["results"]) else 0


def ceilings_of(device: str, dtype: str) -> dict[str, Any]:
    """Without them shares are unknown, times are not."""
    try:
        return run_process("opt_zoo.bench.ceilings", [device, dtype], device, 120)
    except WorkerError as error:
        return {"bytes_per_second": None, "flops_per_second": None, "failed": str(error)}


def parse_options() -> argparse.Namespace:
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="opt-125m", help="a preset of OPTConfig, or a checkpoint")
    parser.add_argument("--parts", type=some_of(PARTS), default=list(PARTS))
    parser.add_argument("--contestants", type=some_of(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--dtypes", type=some_of(ITEM_BYTES), default=["float32"])
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--lengths", type=numbers, default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--new-tokens", type=int, default=33, help="for inference; --lengths are those of the prompt")
    parser.add_argument("--runs", type=int, default=5, help="timed turns of a cell at most")
    parser.add_argument("--seconds", type=float, default=20, help="for the timed turns of a cell; one is always made")
    parser.add_argument("--max-seconds", type=float, default=600, help="for a cell, by its estimate")
    parser.add_argument(
        "--max-memory", type=float, default=None, help="GB for a cell (default: what the machine has free)"
    )
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all cells")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_gpu() else "cpu")
    parser.add_argument("--keep", type=Path, help="a document of --output, the complete cells of which are kept")
    parser.add_argument("--output", help="a file for the JSON document")
    parser.add_argument("--markdown", help="a file for the tables")
    parser.add_argument("--plot", help="a PNG: speed-up and memory against the length")
    options = parser.parse_args()
    if options.max_memory is None:
        options.max_memory = free_memory(options.device) / 1e9
    return options


def describe_conditions(options: argparse.Namespace, config: OPTConfig) -> dict[str, Any]:
    installed = installed_backends()
    return {
        "size": options.size,
        "parameters": parameter_count(config),
        "heads": config.num_attention_heads,
        "head_size": config.head_size,
        "device": options.device,
        "fused": FUSED,
        "new_tokens": options.new_tokens,
        "commit": commit(),
        **describe_environment(BACKENDS[name] for name in installed),
        "peers": {PEER: version_of(PEER)},
        "processor": processor_model(),
        "available_processors": available_processors(),
        "gpu": gpu_model() if options.device == "cuda" else None,
        "command": " ".join(["python", "benchmarks/attention.py", *sys.argv[1:]]),
    }


def keep_earlier(path: Path, document: dict[str, Any]) -> dict[Cell, dict[str, Any]]:
    """The rows of an earlier document with both eager and fused, by cell; `document` then says where they are from."""
    earlier = json.loads(path.read_text())
    differ = [
        f"{name}: {earlier.get(name)}, now {document[name]}"
        for name in CONDITIONS
        if earlier.get(name) != document[name]
    ]
    if differ:
        raise SystemExit(f"{path}: its cells cannot be kept, conditions differ: {'; '.join(differ)}")
    document["kept"] = [*earlier.get("kept", []), {name: earlier[name] for name in ("commit", "date", "command")}]
    measured = {
        Cell(*(row[field] for field in Cell._fields)): row for row in earlier["results"] if row["status"] == "ok"
    }
    return {cell: row for cell, row in measured.items() if all(ran(row["results"][name]) for name in ("eager", FUSED))}


def make_cells(options: argparse.Namespace, config: OPTConfig) -> Iterator[Cell]:
    """The small ones first, all contestants with one batch and length together: so what time allows is complete."""
    for part in options.parts:
        for dtype in options.dtypes:
            cases = sorted(
                ((batch, length) for batch in options.batches for length in options.lengths),
                key=lambda case: (case[0] > 1, case[0] * case[1] * (1 + case[1] / 4096)),
            )
            for batch, length in cases:
                for contestant in options.contestants:
                    if not (part in ALONE and contestant == PEER):  # transformers has no such function
                        yield Cell(part, contestant, dtype, batch, length)


# -- a cell -----------------------------------------------------------------------------------------------------------


def run_cell(
    cell: Cell, options: argparse.Namespace, config: OPTConfig, ceilings: dict[str, Any], left: float, folder: str
) -> dict[str, Any]:
    """A row of the result: `status` "ok", "not run" or "failed", and of each implementation its figures."""
    names = implementations(cell)
    need = estimate(cell, names, options, config, ceilings)
    row = {**cell._asdict(), "needs_seconds": round(need.seconds, 1), "needs_bytes": int(need.nbytes), "results": {}}
    left_out = {}
    if reason := refusal(cell, need, options, config, left):
        less = estimate(cell, (FUSED,), options, config, ceilings)
        if cell.part != "training" or refusal(cell, less, options, config, left):
            return {**row, "status": "not run", "reason": reason}
        names, need, left_out = (FUSED,), less, {"eager": {"not_run": reason}}
    load_average, start = os.getloadavg()[0], time.perf_counter()
    try:
        results = measure(cell, names, options, config, min(left, max(180, 4 * need.seconds)), folder)
    except WorkerError as error:
        results = error.partial | {
            name: {"failed": str(error)} for name in names if not is_timed(error.partial.get(name, {}))
        }
        if not any(map(is_timed, results.values())):
            return {**row, "status": "failed", "reason": str(error)}
    row["seconds"], row["load_average"] = round(time.perf_counter() - start, 1), load_average
    if "not_run" in results:
        return {**row, "status": "not run", "reason": results["not_run"]}
    if cell.part == "training":
        flops = training_flops(cell, config)
        rate = ceilings["flops_per_second"]
        for result in results.values():
            if rate and "step_seconds" in result:
                result["matrix_rate_share"] = flops / result["step_seconds"] / rate
    return {**row, "status": "ok", "reason": "", "results": left_out | results}


def is_timed(result: dict[str, Any]) -> bool:
    return any(key.endswith("_seconds") for key in result)


def implementations(cell: Cell) -> tuple[str, ...]:
    return "eager", FUSED, *(MORE[cell.part][cell.contestant] if cell.part in ALONE else ())


def measure(
    cell: Cell, names: tuple[str, ...], options: argparse.Namespace, config: OPTConfig, timeout: float, folder: str
) -> dict[str, dict[str, Any]]:
    """The worker's answer; for inference, a process for each implementation, since each loads the model."""
    groups = [(name,) for name in names] if cell.part == "inference" else [names]
    answer: dict[str, Any] = {}
    for group in groups:
        job = Job(
            cell.part,
            cell.contestant,
            config.to_dict(),
            options.device,
            cell.dtype,
            cell.batch,
            cell.length,
            group,
            options.runs,
            options.seconds,
            folder,
            options.new_tokens,
        )
        answer |= run_process("benchmarks.attention_worker", [json.dumps(job)], options.device, timeout)
    return answer


def refusal(cell: Cell, need: Need, options: argparse.Namespace, config: OPTConfig, left: float) -> str:
    """Why a cell is not started; "" where it is."""
    tokens = cell.length + (options.new_tokens if cell.part == "inference" else 0)
    if tokens > config.max_position_embeddings:
        return f"{tokens} tokens, the model has {config.max_position_embeddings} positions"
    if cell.contestant in BACKENDS and cell.contestant not in installed_backends():
        return f"{cell.contestant} is not installed"
    if cell.contestant == PEER and version_of(PEER) is None:
        return f"{PEER} is not installed"
    would = f"would need about {need.nbytes / 1e9:.1f} GB and {need.seconds:.0f} s"
    if need.nbytes > options.max_memory * 1e9:
        return f"{would}; {options.max_memory:.1f} GB allowed"
    if need.seconds > options.max_seconds:
        return f"{would}; {options.max_seconds:.0f} s allowed"
    if need.seconds > left:
        return f"{would}; {max(left, 0):.0f} s were left"
    return ""


def failures(row: dict[str, Any]) -> list[str]:
    """What went wrong in a cell: the process, or an implementation within it."""
    own = [row["reason"]] if row["status"] == "failed" else []
    return own + [f"{name}: {result['failed']}" for name, result in row["results"].items() if "failed" in result]


# -- estimates --------------------------------------------------------------------------------------------------------


def training_flops(cell: Cell, config: OPTConfig) -> float:
    """Three times those of a forward pass whose head looks at every position; causal attention is half its square."""
    prefill = work_of(config, cell.dtype, cell.batch, cell.length, 0).prefill_flops
    return 3 * (prefill + cell.batch * (cell.length - 1) * 2 * config.vocab_size * config.word_embed_proj_dim)


def estimate(
    cell: Cell, names: tuple[str, ...], options: argparse.Namespace, config: OPTConfig, ceilings: dict[str, Any]
) -> Need:
    """Of a cell with all turns of the implementations; eager holds the whole square of scores, and multiplies it."""
    rate = RATE_SHARE * (ceilings["flops_per_second"] or 1e11)
    item, weights = ITEM_BYTES[cell.dtype], parameter_count(config) * ITEM_BYTES[cell.dtype]
    rows = cell.batch * cell.length
    square = cell.batch * config.num_attention_heads * cell.length**2
    imports = START_SECONDS[options.device][cell.contestant]
    start = imports + weights / 2e8
    if cell.part == "decoding":
        slots = cell.batch * config.num_attention_heads * config.max_position_embeddings
        return Need(2 * imports, 12 * slots * config.head_size + 5e8)
    if cell.part == "attention":
        call = 4 * 4 * square * config.head_size / rate
        return Need(imports + (2 + 2) * 2 * call, 20 * square + 5e8)
    if cell.part == "training":
        turn = len(names) * training_flops(cell, config) / rate
        timed = max(turn, min(options.seconds, options.runs * turn))
        scores = ("eager" in names) * SCORE_BYTES[cell.contestant] * square
        kept = rows * (12 * config.hidden_size + 3 * config.ffn_dim) * item + scores
        nbytes = 5 * weights + config.num_hidden_layers * kept + 12 * rows * config.vocab_size
        return Need(start + 2 * turn + timed, nbytes)
    work = work_of(config, cell.dtype, cell.batch, cell.length, options.new_tokens)
    call = work.prefill_flops / rate + options.new_tokens * 3 * work.step_bytes / (ceilings["bytes_per_second"] or 1e10)
    return Need(2 * (start + (2 + options.runs) * call), 3 * weights + 12 * square + 8 * rows * config.vocab_size)


def free_memory(device: str) -> float:
    """Bytes; of a GPU nine tenths of what it has, where PyTorch can tell."""
    if device == "cuda":
        return 0.9 * importlib.import_module("torch").cuda.mem_get_info()[1]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 8e9)


def write(document: dict[str, Any], options: argparse.Namespace) -> None:
    if options.output:
        Path(options.output).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    if options.markdown:
        Path(options.markdown).write_text(to_markdown(document))


def draw(document: dict[str, Any], options: argparse.Namespace) -> None:
    if not (options.plot and document["results"]):
        return
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{options.plot}: not drawn, matplotlib is not installed", file=sys.stderr)
    else:
        write_plot(document, options.plot)


if __name__ == "__main__":
    sys.exit(main())
