"""What this machine can do at best: bytes per second read from memory, operations per second of a matrix product.

Read on a CPU: sums of 512 MiB of integers by NumPy, a thread for each processor, which was 1.06 to 1.13 times as fast
as a loop of AVX-512 loads in C. The fastest of several, as it is to be a ceiling. Products are PyTorch's where it is
installed, in each dtype, since NumPy knows float32 alone. On a GPU both are PyTorch's, timed by its events after a
tenth of a second of the same work, of random numbers: a GPU multiplies constants at less power, and so faster. Runs in
a process of its own, `python -m opt_zoo.bench.ceilings DEVICE DTYPE`, whose last line is one JSON document.
"""

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np

BUFFER_BYTES = 512 << 20  # far more than caches hold
MATRIX_ROWS = {"cpu": 2048, "cuda": 8192}
REPEATS = 8
WARM_UP_SECONDS = 0.1


def measure_ceilings(device: str, dtype: str) -> dict[str, float | None]:
    """`bytes_per_second`, and `flops_per_second` of products in a dtype; None where nothing installed can tell."""
    has_torch = importlib.util.find_spec("torch") is not None
    on_cpu, bandwidth, rate = device == "cpu", None, None
    if on_cpu:
        bandwidth = read_bandwidth()
    elif has_torch:
        bandwidth = torch_bandwidth()
    if has_torch:
        rate = torch_matrix_rate(device, dtype)
    elif on_cpu and dtype == "float32":
        rate = numpy_matrix_rate()
    return {"bytes_per_second": bandwidth, "flops_per_second": rate}


def read_bandwidth(nbytes: int = BUFFER_BYTES) -> float:
    """Bytes per second that all processors together read."""
    values = np.ones(nbytes // 8, np.int64)
    threads = available_processors()
    parts = np.array_split(values, threads)
    with ThreadPoolExecutor(threads) as pool:
        return values.nbytes / fastest(lambda: list(pool.map(np.add.reduce, parts)))


def numpy_matrix_rate(rows: int = MATRIX_ROWS["cpu"]) -> float:
    matrix = np.ones((rows, rows), np.float32)
    return 2 * rows**3 / fastest(lambda: matrix @ matrix)


def torch_matrix_rate(device: str, dtype: str) -> float:
    torch = importlib.import_module("torch")
    rows = MATRIX_ROWS[device]
    matrix = torch.randn(rows, rows, device=device).to(getattr(torch, dtype))
    return 2 * rows**3 / (fastest if device == "cpu" else fastest_on_gpu)(lambda: matrix @ matrix)


def torch_bandwidth() -> float:
    torch = importlib.import_module("torch")
    values = torch.ones(4 * BUFFER_BYTES // 4, device="cuda")
    return values.nbytes / fastest_on_gpu(values.sum)


def fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of `REPEATS` calls, after one that is not timed."""
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def fastest_on_gpu(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of `REPEATS` calls in a row, by the GPU's clock, once it runs at speed."""
    cuda = importlib.import_module("torch").cuda
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP_SECONDS:
        call()
        cuda.synchronize()
    events = [cuda.Event(enable_timing=True) for _ in range(1 + REPEATS)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    cuda.synchronize()
    return min(begin.elapsed_time(end) for begin, end in pairwise(events)) / 1e3


def available_processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    print(json.dumps(measure_ceilings(*sys.argv[1:])))
