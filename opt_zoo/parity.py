"""`opt-zoo parity`: do the installed backends compute what the float64 reference computes?"""

import argparse
import os
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from opt_core.checks import ATTENTION_IMPLEMENTATIONS
from opt_core.config import DTYPES
from opt_core.errors import InputError, raise_if
from opt_zoo.arguments import file_problems, some_of, words
from opt_zoo.backends import BACKENDS, installed_backends, load_backend
from opt_zoo.console import counted_progress, stderr_console, stdout_console
from opt_zoo.parity_cases import PADDINGS, TOKENS
from opt_zoo.sources import add_source, display_name, find_source

SUMMARY = "compare the backends with the float64 reference"
DESCRIPTION = """Runs each backend on the same rounded weights as the float64 reference and compares logits, hidden
states, loss and greedy tokens, over dtype, attention implementation and padding. Exit code 1 where a bound is broken;
then the first layer that diverges is named."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--backends", type=some_of(BACKENDS), metavar="LIST", help="default: those installed")
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=list(DTYPES), metavar="LIST", help=words(DTYPES))
    attention = ATTENTION_IMPLEMENTATIONS
    parser.add_argument(
        "--attn", type=some_of(attention), default=list(attention), metavar="LIST", help=words(attention)
    )
    parser.add_argument(
        "--padding", type=some_of(PADDINGS), default=list(PADDINGS), metavar="LIST", help=words(PADDINGS)
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help=f"length of the longest row (default: {TOKENS})"
    )
    parser.add_argument("--new-tokens", type=int, default=40, metavar="N", help="greedy tokens (default: 40; 0: none)")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON; - for stdout, in place of the table")
    parser.add_argument("--html", metavar="FILE", help="write the report as one HTML page")
    parser.add_argument("--png", metavar="FILE", help="draw the errors as a heat map")


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes; returns 0 where everything passed, else 1."""
    from opt_zoo.parity_run import ParityPlan, run_parity
    from opt_zoo.report import parity_report

    _check_arguments(args)
    source = find_source(args.source, args.model)
    _share_the_accelerator()
    backends = [load_backend(name) for name in args.backends or _installed()]
    plan = ParityPlan(source, backends, args.dtypes, args.attn, args.padding, args.tokens, args.new_tokens)
    with counted_progress(f"parity of {display_name(source)}", plan.steps) as step:
        result = run_parity(plan, step)
    report = parity_report(plan, result)
    _write_files(report, args)
    if args.json != "-":
        print_report(report)
    return 0 if result.passed else 1


def _check_arguments(args: argparse.Namespace) -> None:
    problems = [] if args.new_tokens >= 0 else [f"--new-tokens: expected 0 or more, got {args.new_tokens}"]
    problems += [] if args.tokens > 0 else [f"--tokens: expected 1 or more, got {args.tokens}"]
    problems += file_problems(json=args.json, html=args.html, png=args.png)
    raise_if(InputError, "opt-zoo parity", problems)


def _installed() -> tuple[str, ...]:
    names = installed_backends()
    if not names:
        raise InputError("opt-zoo parity", ["--backends: none is installed; pip install opt-zoo[all]"])
    return names


def _share_the_accelerator() -> None:
    """Keeps each framework from taking the whole memory of a GPU, where the others then find none."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")


def _write_files(report: dict, args: argparse.Namespace) -> None:
    if args.json:
        from opt_zoo.report import write_json

        write_json(report, args.json)
    if args.html:
        from opt_zoo.report_html import write_html

        write_html(report, args.html)
    if args.png:
        from opt_zoo.heatmap import write_heatmap

        write_heatmap(report, args.png)
    for path in (args.json, args.html, args.png):
        if path and path != "-":
            stderr_console().print(f"wrote {path}")


def print_report(report: dict) -> None:
    """The tables and the verdict."""
    console = stdout_console()
    source, parameters = escape(report["source"]), report["model"]["parameters"]
    console.print(
        f"Parity of {source} ({parameters:,} parameters) with the float64 reference, on {report['tokens_from']}"
    )
    console.print(_forward_table(report["forward"]))
    if report["greedy"]:
        console.print(_greedy_table(report["greedy"]))
        console.print(agreement_in_words(report["agreements"]))
    failures = list(failures_in_words(report))
    for failure in failures:
        console.print(f"[red]FAIL[/red] {escape(failure)}", soft_wrap=True)
    cells = len(report["forward"]) + len(report["greedy"])
    console.print("[green]passed[/green]" if not failures else "[red]failed[/red]", f"{cells} comparisons")


def _forward_table(cells: Sequence[dict]) -> Table:
    table = Table("backend", "dtype", "attention", "padding")
    for heading in ("worst row, u", "bound, u", "max abs", "top-1", "loss error", "verdict"):
        table.add_column(heading, justify="right")
    for cell in cells:
        table.add_row(*_names(cell), cell["padding"], *numbers_in_words(cell), _verdict(cell))
    return table


def numbers_in_words(cell: dict) -> tuple[str, ...]:
    """Worst row, bound, largest difference, top-1 agreement and loss error of a forward cell, as text."""
    worst, largest, loss = (_number(cell[key], ".3g") for key in ("worst_row_u", "max_abs", "loss_error"))
    ties = f" ({cell['top1_ties']} tied)" if cell["top1_ties"] else ""
    return worst, f"{cell['bound_u']:g}", largest, f"{cell['top1_agreement']:.1%}{ties}", loss


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _greedy_table(texts: Sequence[dict]) -> Table:
    table = Table("backend", "dtype", "attention")
    for heading in ("greedy tokens", "ties", "verdict"):
        table.add_column(heading, justify="right")
    for text in texts:
        table.add_row(*_names(text), str(text["judged"]), str(text["ties"]), _verdict(text))
    return table


def _names(cell: dict) -> tuple[str, str, str]:
    return cell["backend"], cell["dtype"], cell["attn_implementation"]


def _verdict(cell: dict) -> str:
    return "[green]ok[/green]" if cell["passed"] else "[red]FAIL[/red]"


def agreement_in_words(agreements: Sequence[dict]) -> str:
    """How many pairs of backends wrote the same tokens, and where the others part."""
    if not agreements:
        return "Greedy tokens: one backend only, none to compare it with"
    apart = [pair for pair in agreements if not pair["equal"]]
    lines = [f"Greedy tokens: {len(agreements) - len(apart)} of {len(agreements)} pairs of backends wrote the same"]
    lines += [f"  {pair['dtype']} {pair['attn_implementation']}, {pair['first_difference']}" for pair in apart]
    return "\n".join(lines)


def failures_in_words(report: dict):
    """One line for each problem of each cell."""
    for cell in (*report["forward"], *report["greedy"]):
        place = cell.get("first_divergence")
        where = f"; diverges first at: {place}" if place else ""
        padding = f" padding {cell['padding']}" if "padding" in cell else ""
        for problem in cell["problems"]:
            yield f"{' '.join(_names(cell))}{padding}: {problem}{where}"
