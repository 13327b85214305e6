"""Where and with what something was measured: versions, machine, date. Imports no framework to find out."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable

from opt_zoo.backends import Backend

SETTINGS = ("XLA_FLAGS", "TF_ENABLE_ONEDNN_OPTS", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS")  # that change numbers


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
    try:
        return importlib.metadata.version("opt-zoo")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
