"""`opt-zoo bench`: how fast OPT generates here, beside other programs, and against what this machine can do."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from opt_core.config import DTYPES, OPTConfig
from opt_core.errors import InputError, raise_if
from opt_core.presets import PRESETS
from opt_core.small_files import write_whole
from opt_zoo.arguments import file_problems, some_of
from opt_zoo.backends import BACKENDS, installed_backends
from opt_zoo.console import counted_progress, stderr_console, stdout_console
from opt_zoo.environment import has_gpu
from opt_zoo.sources import display_name, find_source

SUMMARY = "measure generation: load, prefill, step, memory, as shares of what the machine can do"
DESCRIPTION = """Generates greedily in each backend, and in other programs with --peers, each sample in a process of its
own, all in turn. Prints medians, and as the last line one JSON document. Exit code 1 where a process failed; what is
not installed is said to be not run. docs/benchmarks.md tells what each column means."""

DEFAULT = "opt-125m"
PEERS = ("transformers", "ctranslate2")  # `opt_zoo.bench.peers` holds them
FEWEST_NEW_TOKENS = 3  # more than any contestant needs for its shorter call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "a preset, with random weights, or folder, weight file, hub id, embedded checkpoint"
    parser.add_argument("source", nargs="?", default=DEFAULT, metavar="SOURCE", help=f"{text} (default: {DEFAULT})")
    parser.add_argument("--backends", type=some_of(BACKENDS), metavar="LIST", help="default: those installed")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=dtypes, metavar="LIST", help=f"of {','.join(DTYPES)}")
    batches, prompts = "rows of a batch (default: 1,8)", "tokens of a prompt (default: 128)"
    parser.add_argument("--batches", type=_counts, default=[1, 8], metavar="LIST", help=batches)
    parser.add_argument("--prompt", type=_counts, default=[128], metavar="LIST", help=prompts)
    peers = f"beside them: some of {','.join(PEERS)}; transformers in the frameworks of --backends (default: none)"
    parser.add_argument("--peers", type=some_of(PEERS), default=[], metavar="LIST", help=peers)
    for option, default, help_ in (
        ("--new-tokens", 64, "tokens of the longer call (default: 64)"),
        ("--repeats", 5, "processes for each cell (default: 5)"),
        ("--runs", 3, "timed pairs of calls in a process (default: 3)"),
        ("--timeout", 900, "seconds for a process (default: 900)"),
    ):
        parser.add_argument(option, type=int, default=default, metavar="N", help=help_)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument(
        "--output", metavar="FILE", help="write the JSON document, with every sample, after each process"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw a PNG: roofline, and a step against the batch")
    parser.add_argument("--json", action="store_true", help="print the JSON document alone")


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes; returns 0 where no process failed, else 1."""
    from opt_zoo.bench.checkpoints import config_of, write_copies
    from opt_zoo.bench.summary import conditions, document
    from opt_zoo.bench.turns import measure

    source = args.source if args.source in PRESETS else find_source(args.source, None)
    config = config_of(source)
    check_arguments(args, config)
    plan = make_plan(args, source, config)
    steps = 1 + plan.repeats * len(plan.cells)
    with tempfile.TemporaryDirectory() as parent, counted_progress("writing checkpoints", steps) as step:
        step("writing checkpoints")
        folders = write_copies(source, Path(parent), {(cell.format, cell.dtype) for cell in plan.cells})
        described = conditions(plan)
        for measured in measure(plan, folders, step):
            result = document(plan, measured, described)
            if args.output:  # after each process: what stops a long run leaves what it had
                write_whole(args.output, json.dumps(result, indent=1, allow_nan=False) + "\n")
    draw(result, args)
    print_result(result, as_json=args.json)
    return 1 if any(row["status"] == "failed" for row in result["results"]) else 0


def make_plan(args: argparse.Namespace, source: str, config: OPTConfig) -> Any:
    """An `opt_zoo.bench.turns.Plan` of the arguments."""
    from opt_zoo.bench.turns import Plan, make_cells

    backends = args.backends or list(installed_backends())
    return Plan(
        display_name(source),
        config,
        args.device or ("cuda" if has_gpu() else "cpu"),
        tuple(make_cells(backends, args.peers, args.dtypes, args.batches, args.prompt)),
        args.new_tokens,
        args.runs,
        args.repeats,
        args.timeout,
    )


def check_arguments(args: argparse.Namespace, config: OPTConfig) -> None:
    """Raises InputError with everything that is wrong."""
    least = {"new_tokens": FEWEST_NEW_TOKENS, "repeats": 1, "runs": 1, "timeout": 1}
    problems = [
        f"--{name.replace('_', '-')}: expected {minimum} or more, got {getattr(args, name)}"
        for name, minimum in least.items()
        if getattr(args, name) < minimum
    ]
    room = config.max_position_embeddings + 1 - max(args.prompt)  # the last token is not fed back
    if args.new_tokens > room:
        problems.append(f"--new-tokens: a prompt of {max(args.prompt)} leaves room for {room}, got {args.new_tokens}")
    if not (args.backends or installed_backends() or args.peers):
        problems.append("--backends: none is installed; pip install opt-zoo[all]")
    raise_if(InputError, "opt-zoo bench", problems + file_problems(output=args.output, plot=args.plot))


def draw(result: dict[str, Any], args: argparse.Namespace) -> None:
    """The picture that was asked for, and which files were written."""
    if args.plot:
        from opt_zoo.bench.plot import write_plot

        write_plot(result, args.plot)
    for path in filter(None, (args.output, args.plot)):
        stderr_console().print(f"wrote {path}")


def print_result(result: dict[str, Any], *, as_json: bool) -> None:
    """The table, what has no figures and why, and the document without its samples in one line."""
    if not as_json:
        from opt_zoo.bench.table import make_table, reasons

        console = stdout_console()
        console.print(make_table(result))
        for line in reasons(result):
            console.print(line, markup=False, soft_wrap=True)
    rows = [{key: value for key, value in row.items() if key != "samples"} for row in result["results"]]
    sys.stdout.write(json.dumps({**result, "results": rows}, allow_nan=False) + "\n")


def _counts(text: str) -> list[int]:
    """The type of an argument that is a list of positive integers with commas."""
    numbers = list(dict.fromkeys(text.split(",")))
    wrong = [number for number in numbers if not number.strip().isdecimal() or int(number) < 1]
    if wrong:
        raise argparse.ArgumentTypeError(f"expected positive integers, got {', '.join(map(repr, wrong))}")
    return [int(number) for number in numbers]
