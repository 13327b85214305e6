"""A parity result as plain data and as a JSON file. The layout is versioned; NaN and infinity become null."""

import dataclasses
import json
import math
from typing import Any

from opt_core.schema import parameter_count
from opt_core.small_files import write_whole
from opt_zoo.comparison import BOUNDS
from opt_zoo.console import print_json
from opt_zoo.environment import describe_environment
from opt_zoo.parity_run import ParityPlan, ParityResult
from opt_zoo.sources import display_name

SCHEMA = "opt-zoo/parity/1"


def parity_report(plan: ParityPlan, result: ParityResult) -> dict[str, Any]:
    """The whole result as JSON data: what was measured, where, each cell, and the verdict."""
    return _finite(
        {
            "schema": SCHEMA,
            "passed": result.passed,
            "source": display_name(plan.source),
            "model": {"parameters": parameter_count(result.config), "config": result.config.to_dict()},
            "tokens_from": result.tokens_from,
            "environment": describe_environment(plan.backends),
            "bounds": {dtype: BOUNDS[dtype]._asdict() for dtype in plan.dtypes},
            "forward": [_cell(cell) for cell in result.forward],
            "greedy": [_cell(text) for text in result.greedy],
            "agreements": [dataclasses.asdict(agreement) for agreement in result.agreements],
        }
    )


def write_json(report: dict[str, Any], path: str) -> None:
    """Writes the report to a file, or to stdout where `path` is "-"."""
    if path == "-":
        print_json(report)
    else:
        write_whole(path, json.dumps(report, indent=2, allow_nan=False) + "\n")


def _cell(cell) -> dict[str, Any]:
    return {**dataclasses.asdict(cell), "passed": cell.passed}


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
