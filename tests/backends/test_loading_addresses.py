"""Files whose tensors lie at addresses that a framework does not take, as most files of the hub: loaded right."""

import itertools

import numpy as np
import pytest
from harness import (
    NUMPY_DTYPES,
    config_of,
    rounded_weights,
    save_random,
    shift_data,
    token_ids,
)

from opt_core.schema import shapes

WIDE = dict(vocab_size=97, hidden_size=64, ffn_dim=96, num_attention_heads=2)  # tensors of whole 64 bytes
ALIGNMENT = {"torch": 1, "tf": 64, "flax": 64}


def address_of(backend, weight) -> int:
    if backend.name == "torch":
        return weight.data_ptr()
    if backend.name == "flax":
        return weight.unsafe_buffer_pointer()
    return np.asarray(memoryview(weight.value.value())).ctypes.data


def memory_of(backend, model) -> list[tuple[int, int]]:
    """First and last byte of each weight, in the order of addresses."""
    itemsize = np.dtype(NUMPY_DTYPES[backend.dtype_of(model.weight("decoder.embed_tokens.weight"))]).itemsize
    starts = {name: address_of(backend, model.weight(name)) for name in shapes(model.config)}
    sizes = {name: int(np.prod(shape)) * itemsize for name, shape in shapes(model.config).items()}
    return sorted((start, start + sizes[name]) for name, start in starts.items())


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [WIDE, {}], ids=["whole 64 bytes", "primes"])
def test_tensors_at_any_address_are_loaded_right(backend, sizes, stored, asked, tmp_path):
    config = config_of(**sizes)
    shift_data(save_random(tmp_path, config, dtype=stored), 24)
    model = backend.model_class().from_pretrained(tmp_path, dtype=asked)
    for name, values in rounded_weights(config, dtype=stored).items():
        want = values.astype(NUMPY_DTYPES[asked]).astype(np.float64)
        np.testing.assert_array_equal(backend.numpy(model.weight(name)), want, err_msg=name)


def test_the_forward_pass_does_not_depend_on_addresses(backend, tmp_path):
    config = config_of(**WIDE)
    save_random(tmp_path, config)
    ids = token_ids(config)
    logits = lambda: backend.numpy(backend.model_class().from_pretrained(tmp_path)(ids).logits)  # noqa: E731
    want = logits()
    shift_data(tmp_path, 8)
    np.testing.assert_array_equal(logits(), want)


@pytest.mark.parametrize("shift", [0, 8])
def test_weights_lie_apart_where_the_framework_takes_them(backend, shift, tmp_path):
    """Two models of one file included: to change one leaves the other as it was."""
    shift_data(save_random(tmp_path, config_of(**WIDE)), shift)
    models = [backend.model_class().from_pretrained(tmp_path) for _ in range(2)]
    spans = sorted(span for model in models for span in memory_of(backend, model))
    assert len(spans) == 2 * len(shapes(models[0].config))
    assert all(start % ALIGNMENT[backend.name] == 0 for start, _ in spans)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
