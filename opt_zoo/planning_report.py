"""The options of a plan on the command line, and the plan as a table or as JSON."""

import argparse
from collections import Counter
from typing import Any

from rich.table import Table

from conversion import open_checkpoint, resolve
from conversion.index import parse_size
from opt_core.config import OPTConfig
from opt_core.errors import InputError, raise_if
from opt_core.presets import PRESETS
from opt_core.sharding import LAYOUTS
from opt_zoo.arguments import some_of, words
from opt_zoo.console import print_json, stdout_console
from opt_zoo.devices import DEFAULT, DEVICES, Device
from opt_zoo.planning import MODES, Job, Plan, fewest_devices, plans
from opt_zoo.sources import display_name, find_source

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
OPTIONS = ["devices", "device", "memory", "bandwidth", "flops", "dtype", "batch", "length", "mode", "layout"]
OPTIONS += ["accumulate", "recompute", "compute_dtype"]
_COLUMNS = {"inference": ("weights", "cache"), "training": ("weights", "gradients", "optimizer")}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "plan", "what the model needs on several devices, instead of what the checkpoint holds; SOURCE may be a preset"
    )
    group.add_argument("--devices", type=int, metavar="N", help="how many (default: 1)")
    group.add_argument("--device", choices=DEVICES, help=f"published figures of one (default: {DEFAULT})")
    group.add_argument("--memory", type=_size, metavar="SIZE", help="of each instead, such as 80GB")
    group.add_argument("--bandwidth", type=_size, metavar="SIZE", help="bytes a second of each instead, such as 2TB")
    group.add_argument("--flops", type=float, metavar="F", help="operations a second of each instead, such as 312e12")
    dtypes = (*DTYPES, *DTYPES.values())
    group.add_argument("--dtype", choices=dtypes, help="of the weights (default: as stored, of a preset float16)")
    group.add_argument("--compute-dtype", choices=dtypes, help="of products in training (default: that of the weights)")
    group.add_argument("--batch", type=int, metavar="B", help="rows, on all devices together (default: 1)")
    group.add_argument("--length", type=int, metavar="T", help="tokens of a row, new ones included (default: 2048)")
    group.add_argument("--mode", choices=MODES, help=f"default: {MODES[0]}")
    group.add_argument("--layout", type=some_of(LAYOUTS), metavar="NAMES", help=words(LAYOUTS))
    group.add_argument("--accumulate", type=int, metavar="N", help="parts of a batch in training (default: 1)")
    group.add_argument("--recompute", action="store_true", default=None, help="gradient checkpointing in training")


def wants_plan(args: argparse.Namespace) -> bool:
    return args.source in PRESETS or any(getattr(args, name) is not None for name in OPTIONS)


def run_plan(args: argparse.Namespace) -> int:
    """Prints the plan; returns 0."""
    given = {"--tensors": args.tensors, "--verify": args.verify}
    raise_if(InputError, "opt-zoo inspect", [f"{name}: not of a plan" for name, is_given in given.items() if is_given])
    source = args.source if args.source in PRESETS else find_source(args.source, args.model)
    job, device = job_of(args, *_config_and_dtype(source)), device_of(args)
    document = describe_plan(job, 1 if args.devices is None else args.devices, device, tuple(args.layout or LAYOUTS))
    document = {"source": display_name(source), **document}
    if args.json:
        print_json(document)
    else:
        print_plan(document)
    return 0


def _config_and_dtype(source: str) -> tuple[OPTConfig, str]:
    """Those of a preset, whose published files are float16, or of a checkpoint."""
    if source in PRESETS:
        return OPTConfig.preset(source), "float16"
    with open_checkpoint(resolve(source)) as checkpoint:
        ((stored, _),) = Counter(checkpoint.dtypes.values()).most_common(1)
        return checkpoint.config, stored if stored in DTYPES.values() else "float32"


def job_of(args: argparse.Namespace, config: OPTConfig, stored: str) -> Job:
    given = dict(mode=args.mode, batch=args.batch, accumulate=args.accumulate, recompute=args.recompute)
    return Job(
        config,
        dtype=DTYPES.get(args.dtype, args.dtype) or stored,
        compute_dtype=DTYPES.get(args.compute_dtype, args.compute_dtype),
        length=min(Job._field_defaults["length"], config.max_position_embeddings)
        if args.length is None
        else args.length,
        **{name: value for name, value in given.items() if value is not None},
    )


def device_of(args: argparse.Namespace) -> Device:
    """That of the name, with the figures that were given instead of its own."""
    device, flops = DEVICES[args.device or DEFAULT], args.flops
    given = dict(memory=args.memory, bandwidth=args.bandwidth, half_flops=flops, float32_flops=flops)
    return device._replace(**{name: value for name, value in given.items() if value is not None})


def describe_plan(job: Job, devices: int, device: Device, layouts: tuple[str, ...]) -> dict[str, Any]:
    """Everything as JSON data: bytes, seconds."""
    found = list(plans(job, devices, device, layouts))
    return {
        "job": {name: value for name, value in job._asdict().items() if name != "config"},
        "devices": devices,
        "device": {**device._asdict(), "flops": device.flops_of(job.computed_in)},
        "plans": [_described(plan, device) for plan in found],
        "fewest_devices": {
            layout: None if (plan := fewest_devices(job, device, layout)) is None else _described(plan, device)
            for layout in layouts
        },
    }


def _described(plan: Plan, device: Device) -> dict[str, Any]:
    return {
        "layout": plan.layout,
        "mesh": dict(zip(plan.mesh.names, plan.mesh.sizes, strict=True)),
        "devices": plan.mesh.devices,
        "batch": plan.batch,
        "bytes": None if plan.memory is None else plan.memory._asdict(),
        "fits": plan.fits(device.memory),
        "seconds": plan.seconds,
        "problems": list(plan.problems),
    }


# -- as text ----------------------------------------------------------------------------------------------------------


def print_plan(document: dict[str, Any]) -> None:
    job, device, console = document["job"], document["device"], stdout_console()
    rates = ", ".join(_rates(device))
    details = f", {job['accumulate']} parts" * (job["accumulate"] > 1) + ", recomputed" * job["recompute"]
    console.print(
        f"{document['source']}, {job['mode']} in {_dtypes(job)}: {job['batch']} x {job['length']} tokens{details}; "
        f"{document['devices']} devices of {_gigabytes(device['memory'])} GB each ({rates})",
        markup=False,
    )
    columns = [*_COLUMNS[job["mode"]], "activations", "gathered", "total"]
    titles = ["prefill", "step"] if job["mode"] == "inference" else ["step"]
    table = Table("layout", *(f"{name}, GB" for name in columns), "fits", *titles)
    for plan in document["plans"]:
        table.add_row(*_row(plan, columns, titles))
    console.print(table)
    for plan in document["plans"]:
        for problem in plan["problems"]:
            console.print(f"{_name(plan)}: {problem.removeprefix(plan['layout'] + ': ')}", markup=False, soft_wrap=True)
    for layout, plan in document["fewest_devices"].items():
        console.print(f"fewest devices, {layout}: {_fewest(plan)}", markup=False)


def _dtypes(job: dict[str, Any]) -> str:
    return f"{job['dtype']}, computed in {job['compute_dtype']}" if job["compute_dtype"] else job["dtype"]


def _rates(device: dict[str, Any]):
    yield device["name"]
    if device["bandwidth"] is not None:
        yield f"{device['bandwidth'] / 1e9:,.0f} GB/s"
    if device["flops"] is not None:
        yield f"{device['flops'] / 1e12:,.4g} Tflop/s"


def _row(plan: dict[str, Any], columns: list[str], titles: list[str]) -> list[str]:
    if plan["bytes"] is None:
        return [_name(plan), *("" for _ in columns), "cannot run"]
    sizes = (_gigabytes(plan["bytes"][name]) for name in columns)
    seconds = plan["seconds"] or {}
    times = (_seconds(seconds[title]) if title in seconds else "unknown" for title in titles)
    return [_name(plan), *sizes, "yes" if plan["fits"] else "no", *times]


def _name(plan: dict[str, Any]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items()) or plan["layout"]


def _fewest(plan: dict[str, Any] | None) -> str:
    if plan is None:
        return "none found"
    return f"{plan['devices']} ({_name(plan)}, {_gigabytes(plan['bytes']['total'])} GB each, batch {plan['batch']})"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.3g}" if size < 1e12 else f"{size / 1e9:,.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except InputError:
        raise argparse.ArgumentTypeError(f"expected a size such as 80GB, got {text!r}") from None
