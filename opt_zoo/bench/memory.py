"""The peak memory of a process that measures itself, and of its GPU."""

import contextlib
import importlib
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The highest resident memory of this process from now on, less what is resident now; Linux alone.

    Resident (VmHWM, VmRSS of /proc/self/status) are also the pages of a mapped file that were touched: weights that a
    framework reads in place count, as copies of them do.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # the peak is what is resident now: proc(5)
        self._before = _resident("VmRSS")

    @property
    def growth(self) -> int | None:
        """Bytes; None where there is no /proc."""
        peak = _resident("VmHWM")
        return None if peak is None or self._before is None else peak - self._before


def _resident(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def peak_gpu_bytes(framework: str) -> int | None:
    """As the framework counts its own; None where it does not."""
    if framework == "torch":
        return int(importlib.import_module("torch").cuda.max_memory_allocated())
    if framework == "tf":
        return int(importlib.import_module("tensorflow").config.experimental.get_memory_info("GPU:0")["peak"])
    if framework == "flax":
        return int(importlib.import_module("jax").devices()[0].memory_stats()["peak_bytes_in_use"])
    return None
