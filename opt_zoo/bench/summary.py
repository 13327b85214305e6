"""Samples made into rows and one JSON document: medians, quartiles, and shares of what the machine can do.

A share is computed for each sample from the ceilings of its own minute; the median is that of the shares.
"""

import statistics
from typing import Any

from opt_core.schema import parameter_count
from opt_zoo.backends import BACKENDS, installed_backends
from opt_zoo.bench.ceilings import available_processors
from opt_zoo.bench.peers import PEERS
from opt_zoo.bench.turns import Measured, Plan
from opt_zoo.bench.work import Work, work_of
from opt_zoo.environment import commit, describe_environment, gpu_model, processor_model, version_of

SCHEMA = "opt-zoo/generation/1"
CEILINGS = ("bytes_per_second", "flops_per_second")


def document(plan: Plan, measured: list[Measured], described: dict[str, Any]) -> dict[str, Any]:
    """The whole result as JSON data: what was measured, where (`conditions`), and a row for each cell."""
    return {
        "schema": SCHEMA,
        "source": plan.source,
        "parameters": parameter_count(plan.config),
        "device": plan.device,
        "new_tokens": plan.new_tokens,
        "repeats": plan.repeats,
        "runs": plan.runs,
        **described,
        "results": [row(measurement, plan) for measurement in measured],
    }


def conditions(plan: Plan) -> dict[str, Any]:
    """Commit, date, machine and versions, of the peers, too."""
    installed = installed_backends()
    environment = describe_environment(BACKENDS[name] for name in installed)
    peers = {name: version_of(name) for name in PEERS if any(cell.peer == name for cell in plan.cells)}
    return {
        "commit": commit(),
        **environment,
        "peers": peers,
        "processor": processor_model(),
        "available_processors": available_processors(),
        "gpu": gpu_model() if plan.device == "cuda" else None,
    }


def row(measured: Measured, plan: Plan) -> dict[str, Any]:
    """One cell; figures are in SI units, `*_quartiles` are the first and the third."""
    cell = measured.cell
    work = work_of(plan.config, *cell.case, plan.new_tokens)
    samples = [{**sample, **derived(sample, work, cell.batch)} for sample in measured.samples]
    return {
        "contestant": cell.contestant,
        **cell._asdict(),
        "status": measured.status,
        "reason": measured.reason,
        **work._asdict(),
        **medians(samples),
        "samples": samples,
    }


def derived(sample: dict[str, Any], work: Work, batch: int) -> dict[str, float | None]:
    """What follows from a sample and the work that it did."""
    bandwidth, rate = (sample[name] for name in CEILINGS)
    step = sample["step_seconds"] if sample["step_seconds"] > 0 else None  # else lost in the noise of the calls
    prefill = sample["prefill_seconds"] if sample["prefill_seconds"] > 0 else None
    return {
        "step_seconds": step,
        "prefill_seconds": prefill,
        "tokens_per_second": _ratio(batch, step),
        "step_bytes_per_second": _ratio(work.step_bytes, step),
        "floor_seconds": _ratio(work.step_bytes, bandwidth),
        "bandwidth_share": _ratio(_ratio(work.step_bytes, step), bandwidth),
        "prefill_flops_per_second": _ratio(work.prefill_flops, prefill),
        "matrix_rate_share": _ratio(_ratio(work.prefill_flops, prefill), rate),
    }


def medians(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every number that the samples have: its median, and under `*_quartiles` the quartiles."""
    result: dict[str, Any] = {}
    for name in dict.fromkeys(key for sample in samples for key in sample if key != "tokens"):
        values = [sample[name] for sample in samples if sample[name] is not None]
        result[name] = statistics.median(values) if values else None
        result[f"{name}_quartiles"] = quartiles(values)
    return result


def quartiles(values: list[float]) -> list[float] | None:
    """The first and the third; the extremes where there are two values."""
    if len(values) < 2:
        return values * 2 or None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
