"""Runs the workers, one process at a time, contestants in turn, so that other work on the machine falls on all of them.

Before the contestants of one dtype, batch and prompt the ceilings of the machine are measured again: a share is one of
the same minute. A contestant that cannot run says why and is left in peace; one that fails is not tried again.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import opt_zoo
from opt_core.config import OPTConfig
from opt_zoo.bench.peers import PEERS
from opt_zoo.bench.worker import Job

LOG_CHARACTERS = 8000  # of what a process that failed wrote on stderr
ONLY_CPU = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}


class Cell(NamedTuple):
    """What is measured: a contestant on a case."""

    peer: str  # "" for ours
    framework: str  # "" for a peer that is its own
    dtype: str
    batch: int
    prompt_tokens: int

    @property
    def contestant(self) -> str:
        return " ".join(filter(None, (self.peer or "opt-zoo", self.framework)))

    @property
    def case(self) -> tuple[str, int, int]:
        return self.dtype, self.batch, self.prompt_tokens

    @property
    def format(self) -> str:
        return PEERS[self.peer][self.framework].format if self.peer else "safetensors"


class Plan(NamedTuple):
    """All that is to be measured, and on what."""

    source: str  # as it is called in reports
    config: OPTConfig
    device: str  # "cpu" or "cuda"
    cells: tuple[Cell, ...]
    new_tokens: int
    runs: int  # timed pairs of calls in each process
    repeats: int  # processes for each cell
    timeout: float  # seconds for a process


class Measured(NamedTuple):
    """The samples of a cell, or why there are none."""

    cell: Cell
    status: str  # "ok", "not run" or "failed"
    reason: str
    samples: tuple[dict[str, Any], ...]


class WorkerError(Exception):
    """A process that ended otherwise than with a result; `partial` is the last that it had printed, if anything."""

    def __init__(self, reason: str, partial: dict[str, Any] | None = None):
        super().__init__(reason)
        self.partial = partial or {}


def make_cells(
    backends: list[str], peers: list[str], dtypes: list[str], batches: list[int], prompts: list[int]
) -> Iterator[Cell]:
    """Every contestant on every case; of a peer with several frameworks, those of the backends asked for."""
    contestants = [("", backend) for backend in backends]
    contestants += [(peer, framework) for peer in peers for framework in PEERS[peer] if framework in ("", *backends)]
    for dtype in dtypes:
        for batch in batches:
            for prompt_tokens in prompts:
                yield from (Cell(*names, dtype, batch, prompt_tokens) for names in contestants)


def measure(plan: Plan, folders: dict[tuple[str, str], Path], step: Callable[[str], None]) -> Iterator[list[Measured]]:
    """Measures all cells `repeats` times over; yields after each what has been measured so far, of all cells.

    `folders` are the checkpoints by format and dtype.
    """
    samples: dict[Cell, list[dict[str, Any]]] = {cell: [] for cell in plan.cells}
    ended: dict[Cell, tuple[str, str]] = {}
    for turn in range(plan.repeats):
        case, ceilings = None, {}
        for cell in plan.cells:
            step(f"{turn + 1}/{plan.repeats} {cell.contestant} {cell.dtype} x {cell.batch}")
            if cell in ended:
                continue
            if cell.case != case:
                case, ceilings = cell.case, measure_ceilings(plan, cell.dtype)
            try:
                sample = measure_once(plan, cell, folders[cell.format, cell.dtype])
            except WorkerError as error:
                ended[cell] = ("failed", str(error))
            else:
                if "not_run" in sample:
                    ended[cell] = ("not run", sample["not_run"])
                else:
                    samples[cell].append({**sample, **ceilings})
            begun = [cell for cell in plan.cells if cell in ended or samples[cell]]
            yield [Measured(cell, *ended.get(cell, ("ok", "")), tuple(samples[cell])) for cell in begun]


def measure_once(plan: Plan, cell: Cell, folder: Path) -> dict[str, Any]:
    """One sample, with the load average of the minute before it."""
    load_average = os.getloadavg()[0]
    job = Job(cell.peer, cell.framework, str(folder), plan.device, *cell.case, plan.new_tokens, plan.runs)
    sample = run_process("opt_zoo.bench.worker", [json.dumps(job)], plan.device, plan.timeout)
    return {**sample, "load_average": load_average}


def measure_ceilings(plan: Plan, dtype: str) -> dict[str, Any]:
    """`bytes_per_second` and `flops_per_second` of the machine, now."""
    return run_process("opt_zoo.bench.ceilings", [plan.device, dtype], plan.device, plan.timeout)


def run_process(module: str, arguments: list[str], device: str, timeout: float) -> dict[str, Any]:
    """The JSON of the last line that a module of this package prints.

    Raises:
        WorkerError: with the last line that it wrote on stderr, or with the time that it had.
    """
    root = str(Path(opt_zoo.__file__).parent.parent)  # of this very code, installed or not
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    environment |= ONLY_CPU if device == "cpu" else {}
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        out, err = (_text(x) for x in (error.stdout, error.stderr))
        sys.stderr.write(err[-LOG_CHARACTERS:])
        raise WorkerError(f"took longer than {timeout:g} seconds", _last_document(out)) from None
    if done.returncode:
        sys.stderr.write(done.stderr[-LOG_CHARACTERS:])
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise WorkerError(f"ended with {done.returncode}: {last}", _last_document(done.stdout))
    return json.loads(done.stdout.strip().splitlines()[-1])


def _text(output: str | bytes | None) -> str:
    """What a process that was stopped had written: bytes, whatever was asked for (CPython issue 87597)."""
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _last_document(output: str) -> dict[str, Any] | None:
    for line in reversed(output.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(document := json.loads(line), dict):
                return document
    return None
