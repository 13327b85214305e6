"""Which backends are tested: all three, or those of `--backends torch,tf,flax`. One asked for and missing fails."""

import os
import re
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # frameworks share a GPU
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
if "PYTEST_XDIST_WORKER" in os.environ:  # PyTorch's threads wait actively: several processes with as many each crawl
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

BACKENDS = ("torch", "tf", "flax")
POISONED = re.compile("illegal memory access|unspecified launch failure|device-side assert|misaligned address", re.I)


def pytest_addoption(parser):
    parser.addoption("--backends", default=",".join(BACKENDS), help="backends to test, separated by commas")


def pytest_configure(config):
    unknown = sorted(set(config.getoption("--backends").split(",")) - set(BACKENDS))
    if unknown:
        raise pytest.UsageError(f"--backends: expected some of {', '.join(BACKENDS)}, got {', '.join(unknown)}")


def pytest_ignore_collect(collection_path, config):
    """Leaves out what is particular to a backend that was not asked for: it may not be installed."""
    if collection_path.name in BACKENDS and collection_path.parent == Path(__file__).parent:
        return collection_path.name not in config.getoption("--backends").split(",") or None
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Ends the process with the test that has left the GPU unusable: every later one would fail with it."""
    report = yield
    if item.get_closest_marker("gpu") and call.excinfo and POISONED.search(str(call.excinfo.value)):
        os._exit(3)
    return report


def pytest_generate_tests(metafunc):
    from harness import backends_asked_for

    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends_asked_for(metafunc.config), indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request):
    """One backend of `--backends` behind calls that are the same for the three (`tests/harness.py`)."""
    from harness import load_backend

    return load_backend(request.param)


@pytest.fixture(scope="session")
def backends(request):
    """All backends of `--backends`."""
    from harness import backends_asked_for, load_backend

    return [load_backend(name) for name in backends_asked_for(request.config)]
