"""Where and with what something was measured: versions, machine, date. Imports no framework to find out."""

import datetime
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from opt_zoo.backends import Backend

SETTINGS = ("XLA_FLAGS", "TF_ENABLE_ONEDNN_OPTS", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS")  # that change numbers


ROOT = Path(__file__).parent.parent
CODE = ("benchmarks", "conversion", "opt_core", "opt_flax", "opt_tf", "opt_torch", "opt_zoo")


def describe_environment(backends: Iterable[Backend]) -> dict[str, object]:
    """Facts as JSON: date (UTC), versions, platform, processors, and the settings of `SETTINGS` that are set."""
    versions = {"opt-zoo": package_version(), "python": platform.python_version()}
    versions["numpy"] = importlib.metadata.version("numpy")
    for backend in backends:
        versions.update(backend.versions)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def package_version() -> str:
    """The version of opt-zoo, "not installed" in a bare checkout."""
    return version_of("opt-zoo") or "not installed"


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit, "-dirty" when its code has been edited since; outside a clone OPT_ZOO_COMMIT, else "unknown"."""
    # An environment of its own may lie in a repository of something else.
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return os.environ.get("OPT_ZOO_COMMIT", "unknown")
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)  # noqa: E731
    edited = git("diff", "--quiet", "HEAD", "--", *CODE).returncode
    return git("rev-parse", "--short=12", "HEAD").stdout.strip() + ("-dirty" if edited == 1 else "")


def processor_model() -> str:
    """As the system calls it; "unknown" where that is not Linux."""
    return _first_value(Path("/proc/cpuinfo"), "model name")


def gpu_model() -> str:
    """Of the first NVIDIA GPU that the driver knows, "unknown" if it knows none."""
    found = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    if found:
        return _first_value(found[0], "Model")
    return _ask_the_driver("name")  # some containers hide the folder


def gpu_driver() -> str:
    """The version of NVIDIA's driver, or "unknown"."""
    return _ask_the_driver("driver_version")


@functools.cache
def _ask_the_driver(field: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU that this process may use."""
    return gpu_model() != "unknown" and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def _first_value(file: Path, key: str) -> str:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "unknown")
