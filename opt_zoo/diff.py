"""`opt-zoo diff`: what differs between two checkpoints of any formats, from their weights or from their manifests."""

import argparse
import math
from pathlib import Path
from typing import Any

from conversion import open_checkpoint, resolve
from conversion.difference import compare_tables, compare_weights, differing_fields, differing_hashes, table_of
from conversion.manifest import read_manifest
from opt_zoo.console import byte_progress, print_json, stdout_console
from opt_zoo.sources import display_name, find_source

SUMMARY = "compare the weights of two checkpoints"
DESCRIPTION = """Compares configs, names, shapes, dtypes and every value of two checkpoints, whatever their formats.
Exit code 0 where they are equal bit for bit, 1 where they differ."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="folder, weight file or hub id")
    parser.add_argument("second", metavar="B", help="the same")
    parser.add_argument(
        "--manifest", action="store_true", help="compare the hashes in the two manifests alone, without reading weights"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every weight")


def run(args: argparse.Namespace) -> int:
    """Prints what differs; returns 0 for equal checkpoints, 1 for others."""
    sources = [find_source(source, None) for source in (args.first, args.second)]
    names = [display_name(source) for source in sources]
    paths = [resolve(source) for source in sources]
    found = compare_manifests(*paths) if args.manifest else compare_checkpoints(*paths)
    report = {"first": names[0], "second": names[1], **found}
    report["equal"] = not any(report[key] for key in _DIFFERENCES)
    if args.json:
        print_json(report)
    else:
        print_report(report)
    return 0 if report["equal"] else 1


_DIFFERENCES = ("config", "missing", "extra", "shapes", "dtypes", "differing")


def compare_manifests(first: Path, second: Path) -> dict[str, Any]:
    """What names, shapes, dtypes and hashes tell, as JSON data."""
    a, b = read_manifest(first), read_manifest(second)
    hashes = [{"name": name} for name in differing_hashes(a.weights, b.weights)]
    table = compare_tables(table_of(a), table_of(b))
    return {
        "formats": [a.format, b.format],
        "compared": len(a.weights),
        "weights_read": False,
        "config": {},
        **table._asdict(),
        "differing": hashes,
    }


def compare_checkpoints(first: Path, second: Path) -> dict[str, Any]:
    """What configs, tables and values tell, as JSON data."""
    with open_checkpoint(first) as a, open_checkpoint(second) as b, byte_progress("comparing") as progress:
        weights = compare_weights(a, b, progress)
        table = compare_tables(table_of(a), table_of(b))
        return {
            "formats": [a.format, b.format],
            "compared": len(weights),
            "weights_read": True,
            "config": differing_fields(a.config, b.config),
            **table._asdict(),
            "differing": [
                {
                    "name": weight.name,
                    "values": weight.values,
                    "differing_values": weight.differing,
                    "largest_difference": weight.largest if math.isfinite(weight.largest) else None,
                }
                for weight in weights
                if not weight.is_equal
            ],
        }


def print_report(report: dict[str, Any]) -> None:
    """The report as text: a line for each difference."""
    console = stdout_console()
    for line in [*_lines(report), _summary(report)]:
        console.print(line, markup=False, soft_wrap=True)


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [f"config: {field}: {a} and {b}" for field, (a, b) in report["config"].items()]
    lines += [f"{name}: only in {report['first']}" for name in report["missing"]]
    lines += [f"{name}: only in {report['second']}" for name in report["extra"]]
    lines += [f"{name}: shape {a} and {b}" for name, (a, b) in report["shapes"].items()]
    lines += [f"{name}: {a} and {b}" for name, (a, b) in report["dtypes"].items()]
    return lines + [_weight_line(**weight) for weight in report["differing"]]


def _weight_line(name: str, values: int = 0, differing_values: int = 0, largest_difference: float | None = None) -> str:
    if not values:
        return f"{name}: other values"
    by = "where one is not finite" if largest_difference is None else f"by at most {largest_difference:.6g}"
    return f"{name}: {differing_values:,} of {values:,} values differ, {by}"


def _summary(report: dict[str, Any]) -> str:
    formats = " and ".join(report["formats"])
    if report["equal"]:
        by = "bit for bit" if report["weights_read"] else "by what their manifests say, no weight was read"
        return f"equal: {report['compared']} weights, {by} ({formats})"
    return f"different: values of {len(report['differing'])} of {report['compared']} weights compared ({formats})"
