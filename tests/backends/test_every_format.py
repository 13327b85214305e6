"""from_pretrained takes every format that conversion writes, in every backend, and holds the same values then."""

import numpy as np
import pytest
from harness import config_of, rounded_weights

from conversion import write_checkpoint
from conversion.formats import FORMATS
from opt_core.schema import shapes

WRITTEN = [name for name, format in FORMATS.items() if format.is_written]


@pytest.mark.parametrize("format", WRITTEN)
def test_a_model_loads_from_any_format(backend, format, tmp_path):
    config = config_of()
    weights = rounded_weights(config)
    weights["decoder.embed_positions.weight"][:2] = 0  # which some formats leave out
    write_checkpoint(tmp_path / format, config, weights, format=format)
    model = backend.model_class().from_pretrained(tmp_path / format)
    unset = dict(architectures=None, torch_dtype=None)
    assert model.config.replace(**unset) == config.replace(**unset)
    for name in shapes(config):
        np.testing.assert_array_equal(backend.numpy(model.weight(name)), weights[name], err_msg=name)
