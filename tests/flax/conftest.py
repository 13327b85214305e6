"""A test with the marker `gpu` fails where JAX has none: it would compute on a CPU without a word."""

import jax
import pytest


@pytest.fixture(autouse=True)
def gpu(request):
    if request.node.get_closest_marker("gpu") is not None:
        assert jax.default_backend() == "gpu"
