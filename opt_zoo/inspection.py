"""`opt-zoo inspect`: what a checkpoint holds, from its headers and config alone; no weight is read unless asked for.

With an option of a plan, or for a preset: what the model needs on several devices (`planning_report`).
"""

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from conversion import Checkpoint, open_checkpoint, resolve
from conversion.manifest import differing_weights, read_manifest
from conversion.stored import DTYPES
from opt_core.errors import CheckpointError
from opt_zoo.console import print_json, stdout_console
from opt_zoo.planning_report import add_plan_arguments, run_plan, wants_plan
from opt_zoo.sources import add_source, display_name, find_source

SUMMARY = "show what a checkpoint holds"
DESCRIPTION = """Shows the config, the class, the format, dtypes and sizes of a checkpoint, and whether its tensors are
those that its config asks for. Exit code 2 where they are not, or with --verify where a weight is another. With
--devices or another option of a plan: what each of several devices needs, which layouts fit, and the least time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--verify", action="store_true", help="read every weight and compare it with its hash in the manifest"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every tensor, or with the plan")
    add_plan_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the description; returns 0 for a whole checkpoint, 2 for one that does not fit its config."""
    if wants_plan(args):
        return run_plan(args)
    source = find_source(args.source, args.model)
    path = resolve(source)
    with open_checkpoint(path) as checkpoint:
        description = describe(checkpoint, display_name(source))
        if args.verify:
            description["problems"] += _differing(checkpoint, path)
    if args.json:
        print_json(description)
    else:
        print_description(description, with_tensors=args.tensors)
    return 2 if description["problems"] else 0


def describe(checkpoint: Checkpoint, source: str) -> dict[str, Any]:
    """Everything that headers and config say, as JSON data."""
    shapes, dtypes, problems = checkpoint.shapes, checkpoint.dtypes, _problems(checkpoint)
    return {
        "source": source,
        "format": checkpoint.format,
        "task": checkpoint.task,
        "parameters": sum(map(math.prod, shapes.values())),
        "bytes": sum(math.prod(shape) * DTYPES[dtypes[name]].itemsize for name, shape in shapes.items()),
        "dtypes": dict(Counter(dtypes.values())),
        "config": checkpoint.config.to_dict(),
        "unknown_config_fields": sorted(checkpoint.config.extra),
        "fits_config": not problems,
        "problems": problems,
        "tensors": [dict(name=name, shape=list(shapes[name]), dtype=dtypes[name]) for name in shapes],
    }


def _problems(checkpoint: Checkpoint) -> list[str]:
    try:
        checkpoint.check()
    except CheckpointError as error:
        return list(error.problems)
    return []


def _differing(checkpoint: Checkpoint, path: Path) -> list[str]:
    text = "expected what its hash in the manifest says, got other values"
    return [f"{name}: {text}" for name in differing_weights(checkpoint, read_manifest(path))]


def print_description(description: dict[str, Any], *, with_tensors: bool = False) -> None:
    """The description as text."""
    console = stdout_console()
    table = Table(show_header=False, box=None)
    for name, value in _lines(description).items():
        table.add_row(name, escape(value))
    console.print(table)
    if with_tensors:
        listing = Table("tensor", "shape", "dtype")
        for tensor in description["tensors"]:
            listing.add_row(escape(tensor["name"]), " x ".join(map(str, tensor["shape"])), tensor["dtype"])
        console.print(listing)
    for problem in description["problems"]:
        console.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)


def _lines(description: dict[str, Any]) -> dict[str, str]:
    config = description["config"]
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in description["dtypes"].items())
    norm = "pre-norm" if config["do_layer_norm_before"] else "post-norm"
    width, embed, heads = config["hidden_size"], config["word_embed_proj_dim"], config["num_attention_heads"]
    pruned = sum(map(len, config.get("pruned_heads", {}).values()))
    pruning = f" ({pruned} of them pruned in {len(config['pruned_heads'])} layers)" if pruned else ""
    projections = f", word embeddings of {embed} projected" if embed != width else ""
    return {
        "source": description["source"],
        "format": description["format"],
        "class": description["task"],
        "parameters": f"{description['parameters']:,}",
        "weights": f"{description['bytes']:,} bytes in {len(description['tensors'])} tensors ({dtypes})",
        "layers": f"{config['num_hidden_layers']} of width {width}, {heads} heads{pruning}, {norm}{projections}",
        "vocabulary": f"{config['vocab_size']:,} tokens, {config['max_position_embeddings']:,} positions",
        "unknown config": ", ".join(description["unknown_config_fields"]) or "none",
        "tensors fit the config": "yes" if description["fits_config"] else "no",
    }
