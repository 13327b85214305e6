"""Arrays for parameters: views where dtype and address fit, else copies with the values rounded once."""

import warnings

import numpy as np
import pytest
from harness import NUMPY_DTYPES, config_of, rounded_weights, save_random, shift_data

from conversion import open_checkpoint, parameters, write_checkpoint
from conversion.parameters import read_parameters
from opt_core.errors import CheckpointError
from opt_core.schema import shapes

WIDE = dict(vocab_size=97, hidden_size=64, ffn_dim=96, num_attention_heads=2)  # tensors of whole 64 bytes


def shares_pages(checkpoint, name: str, array: np.ndarray) -> bool:
    return np.shares_memory(checkpoint.read(name), array)


@pytest.mark.parametrize("alignment", [1, 64])
@pytest.mark.parametrize("shift", [0, 8, 40])
def test_arrays_are_views_where_their_addresses_fit_and_copies_where_not(tmp_path, shift, alignment):
    config = config_of(**WIDE)
    shift_data(save_random(tmp_path, config), shift)
    checkpoint = open_checkpoint(tmp_path)
    arrays = dict(read_parameters(checkpoint, shapes(config), "float32", alignment=alignment))
    assert arrays.keys() == shapes(config).keys()
    for name, array in arrays.items():
        assert array.ctypes.data % alignment == 0
        assert shares_pages(checkpoint, name, array) == (alignment == 1 or shift == 0), name
        np.testing.assert_array_equal(array, checkpoint.read(name))


@pytest.mark.parametrize("asked", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_pieces_and_buffers_of_any_size_hold_the_values_rounded_once(tmp_path, stored, asked, monkeypatch):
    monkeypatch.setattr(parameters, "_CHUNK_ELEMENTS", 101)
    monkeypatch.setattr(parameters, "_BUFFER_BYTES", 5003)
    config = config_of()
    checkpoint = open_checkpoint(shift_data(save_random(tmp_path, config, dtype=stored), 24))
    pairs = list(read_parameters(checkpoint, shapes(config), asked, alignment=64))
    assert sorted(name for name, _ in pairs) == sorted(shapes(config))  # each once
    arrays = dict(pairs)
    for name, values in rounded_weights(config, dtype=stored).items():
        assert arrays[name].dtype == NUMPY_DTYPES[asked]
        assert arrays[name].ctypes.data % 64 == 0
        assert arrays[name].flags.writeable
        np.testing.assert_array_equal(arrays[name], values.astype(NUMPY_DTYPES[asked]), err_msg=name)


def test_copies_lie_apart(tmp_path):
    config = config_of()
    checkpoint = open_checkpoint(save_random(tmp_path, config))
    arrays = dict(read_parameters(checkpoint, shapes(config), "bfloat16"))
    for number, array in enumerate(arrays.values()):
        array[...] = number
    for number, array in enumerate(arrays.values()):
        assert (array == number).all()


def test_writing_to_an_array_never_reaches_the_file(tmp_path):
    config = config_of()
    shift_data(save_random(tmp_path, config), 8)
    before = (tmp_path / "model.safetensors").read_bytes()
    for alignment in (1, 64):
        for _, array in read_parameters(open_checkpoint(tmp_path), shapes(config), "float32", alignment=alignment):
            array[...] = 7
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_values_beyond_the_range_are_named_and_stored_infinities_pass_without_a_warning(tmp_path):
    config = config_of(num_hidden_layers=0)
    name = "decoder.embed_tokens.weight"
    weights = rounded_weights(config)
    weights[name][3, 5] = -np.inf
    write_checkpoint(tmp_path, config, weights, allow_nonfinite=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((_, array),) = read_parameters(open_checkpoint(tmp_path), [name], "float16")
        assert array[3, 5] == -np.inf
        weights[name][4, 6] = -1e6
        write_checkpoint(tmp_path, config, weights, overwrite=True, allow_nonfinite=True)
        with pytest.raises(CheckpointError, match=f"{name}: expected values within the range of float16, got 1e.06"):
            list(read_parameters(open_checkpoint(tmp_path), [name], "float16"))


def test_an_error_in_a_thread_is_raised(tmp_path, monkeypatch):
    def fail(chunk):
        raise MemoryError("no room")

    monkeypatch.setattr(parameters, "_copy", fail)
    config = config_of()
    checkpoint = open_checkpoint(save_random(tmp_path, config))
    with pytest.raises(MemoryError, match="no room"):
        dict(read_parameters(checkpoint, shapes(config), "float16"))
