"""A test with the marker `gpu` fails where TensorFlow has none: it would compute on a CPU without a word."""

import pytest
import tensorflow as tf


@pytest.fixture(autouse=True)
def gpu(request):
    if request.node.get_closest_marker("gpu") is not None:
        assert tf.config.list_physical_devices("GPU")
