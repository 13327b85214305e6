"""A training step of our three Trainers beside transformers: seconds, peak memory, share of the machine's matrix rate.

    python benchmarks/training.py --output training.json --markdown training.md

Each sample is a process of its own (training_worker.py), contestants in turn, so that other work on the machine falls
on all of them; figures are medians over processes of medians over steps. Before each turn the matrix rate is measured
again, and a share is one of the same turn. The last line is one JSON document. Exit code 1 where a process failed.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.training_worker import CONTESTANTS, DTYPES, Job
from opt_core import OPTConfig
from opt_core.presets import PRESETS
from opt_core.schema import parameter_count
from opt_zoo.arguments import some_of
from opt_zoo.backends import BACKENDS, installed_backends
from opt_zoo.bench.ceilings import available_processors
from opt_zoo.bench.checkpoints import config_of, write_copies
from opt_zoo.bench.turns import WorkerError, run_process
from opt_zoo.bench.work import work_of
from opt_zoo.console import counted_progress
from opt_zoo.environment import commit, describe_environment, processor_model, version_of
from opt_zoo.sources import find_source

SCHEMA = "opt-zoo/training/1"


class Cell(NamedTuple):
    contestant: str
    dtype: str


def main() -> int:
    options = parse_options()
    source = options.size if options.size in PRESETS else find_source(options.size, None)
    config = config_of(source)
    cells = [Cell(contestant, dtype) for dtype in options.dtypes for contestant in options.contestants]
    with tempfile.TemporaryDirectory() as parent, counted_progress("writing", 1 + options.repeats * len(cells)) as step:
        step("writing checkpoints")
        formats = {(CONTESTANTS[cell.contestant].format, "float32") for cell in cells}
        folders = write_copies(source, Path(parent), formats)
        if options.dropout is not None:
            set_dropout(folders.values(), options.dropout)
        samples, ended = measure(cells, folders, options, step)
    document = {
        "schema": SCHEMA,
        **conditions(options, config),
        "results": [row(cell, samples[cell], ended.get(cell), config, options) for cell in cells],
    }
    if options.output:
        Path(options.output).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    if options.markdown:
        Path(options.markdown).write_text(to_markdown(document))
    print(to_markdown(document))
    print(json.dumps(document, allow_nan=False))
    return 1 if any(result["status"] == "failed" for result in document["results"]) else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="opt-125m", help="a preset, with random weights, or a checkpoint")
    parser.add_argument("--contestants", type=some_of(CONTESTANTS), default=list(CONTESTANTS), metavar="LIST")
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=["float32", "bfloat16"], metavar="LIST")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the model; default: 0")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of a process that are not timed")
    parser.add_argument("--runs", type=int, default=5, help="steps of a process that are")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each cell")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a process")
    parser.add_argument("--output", help="a file for the JSON document")
    parser.add_argument("--markdown", help="a file for the table")
    return parser.parse_args()


def set_dropout(folders: Any, dropout: float) -> None:
    for folder in folders:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, "dropout": dropout}))


def measure(
    cells: list[Cell], folders: dict[tuple[str, str], Path], options: argparse.Namespace, step: Callable[[str], None]
) -> tuple[dict[Cell, list[dict[str, Any]]], dict[Cell, tuple[str, str]]]:
    """The samples of every cell; and of those that ended otherwise, the status and the reason."""
    samples: dict[Cell, list[dict[str, Any]]] = {cell: [] for cell in cells}
    ended: dict[Cell, tuple[str, str]] = {}
    for turn in range(options.repeats):
        rates: dict[str, float | None] = {}
        for cell in cells:
            step(f"{turn + 1}/{options.repeats} {cell.contestant} {cell.dtype}")
            if cell in ended:
                continue
            try:
                if cell.dtype not in rates:
                    ceilings = run_process("opt_zoo.bench.ceilings", ["cpu", cell.dtype], "cpu", options.timeout)
                    rates[cell.dtype] = ceilings["flops_per_second"]
                folder = str(folders[CONTESTANTS[cell.contestant].format, "float32"])
                shape = (options.batch, options.length, options.warm_up, options.runs)
                job = Job(cell.contestant, folder, cell.dtype, *shape)
                sample = run_process("benchmarks.training_worker", [json.dumps(job)], "cpu", options.timeout)
            except WorkerError as error:
                ended[cell] = ("failed", str(error))
                continue
            if "not_run" in sample:
                ended[cell] = ("not run", sample["not_run"])
            else:
                samples[cell].append({**sample, "flops_per_second": rates[cell.dtype]})
    return samples, ended


def training_flops(config: OPTConfig, batch: int, length: int) -> float:
    """Three times those of a forward pass whose head looks at every position; causal attention is half its square."""
    prefill = work_of(config, "float32", batch, length, 0).prefill_flops
    return 3 * (prefill + batch * (length - 1) * 2 * config.vocab_size * config.word_embed_proj_dim)


def row(
    cell: Cell,
    samples: list[dict[str, Any]],
    ended: tuple[str, str] | None,
    config: OPTConfig,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One cell of the result; figures are in SI units."""
    status, reason = ended or ("ok", "")
    if ended:
        return {**cell._asdict(), "status": status, "reason": reason}
    flops = training_flops(config, options.batch, options.length)
    rated = [sample for sample in samples if sample["flops_per_second"]]
    peaks = [sample["peak_bytes"] for sample in samples if sample["peak_bytes"] is not None]
    seconds = statistics.median(sample["step_seconds"] for sample in samples)
    shares = [flops / sample["step_seconds"] / sample["flops_per_second"] for sample in rated]
    return {
        **cell._asdict(),
        "status": status,
        "reason": reason,
        "step_seconds": seconds,
        "tokens_per_second": options.batch * options.length / seconds,
        "peak_bytes": statistics.median(peaks) if peaks else None,
        "matrix_rate_share": statistics.median(shares) if shares else None,
        "floor_seconds": statistics.median(flops / sample["flops_per_second"] for sample in rated) if rated else None,
        "first_losses": samples[0]["losses"][:3],
        "samples": samples,
    }


def conditions(options: argparse.Namespace, config: OPTConfig) -> dict[str, Any]:
    installed = installed_backends()
    return {
        "size": options.size,
        "parameters": parameter_count(config),
        "batch": options.batch,
        "length": options.length,
        "dropout": options.dropout,
        "repeats": options.repeats,
        "runs": options.runs,
        "commit": commit(),
        **describe_environment(BACKENDS[name] for name in installed),
        "peers": {"transformers": version_of("transformers")},
        "processor": processor_model(),
        "available_processors": available_processors(),
        "command": " ".join(["python", "benchmarks/training.py", *sys.argv[1:]]),
    }


def to_markdown(document: dict[str, Any]) -> str:
    """A table for each dtype under a paragraph of what was measured where."""
    versions = {**document["versions"], **{name: v for name, v in document["peers"].items() if v}}
    lines = [
        f"{document['size']}, {document['batch']} x {document['length']} tokens, AdamW, dropout {document['dropout']}; "
        f"{document['available_processors']} processors of {document['processor']}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; medians of {document['repeats']} "
        f"processes with {document['runs']} steps each; commit {document['commit']}, {document['date']}. "
        f"`{document['command']}`",
    ]
    for dtype in dict.fromkeys(result["dtype"] for result in document["results"]):
        rows = [result for result in document["results"] if result["dtype"] == dtype]
        lines += [
            "",
            f"### {dtype}",
            "",
            "| contestant | step, s | tokens/s | peak, GB | of matrix rate, % | first loss |",
        ]
        lines += ["|---|---|---|---|---|---|", *map(markdown_row, rows)]
    return "\n".join(lines) + "\n"


def markdown_row(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"| {result['contestant']} | {result['status']}: {result['reason']} | | | | |"
    scaled = lambda name, scale, digits: (  # noqa: E731
        "" if result[name] is None else f"{result[name] * scale:.{digits}f}"
    )
    cells = [
        result["contestant"],
        scaled("step_seconds", 1, 3),
        scaled("tokens_per_second", 1, 0),
        scaled("peak_bytes", 1e-9, 2),
        scaled("matrix_rate_share", 100, 0),
        f"{result['first_losses'][0]:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
