"""The law of left-packing, the same in every backend: real tokens first, in their order, and back without a loss."""

import importlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

WIDTH, TOKENS, ROWS = 3, 7, 2  # one shape, so that compiled functions are compiled once

masks = st.lists(st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS), min_size=ROWS, max_size=ROWS)
laws = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def packing(backend):
    return importlib.import_module(f"opt_{backend.name}.packing")


@laws
@given(mask=masks)
def test_real_tokens_come_first_and_in_their_order(backend, packing, mask):
    mask = np.array(mask)
    made = packing.make_packing(backend.array(mask))
    x = np.arange(ROWS * TOKENS * WIDTH, dtype=np.float32).reshape(ROWS, TOKENS, WIDTH)
    packed = backend.numpy(packing.pack(backend.array(x), made))
    assert backend.numpy(made.lengths_B).tolist() == mask.sum(1).tolist()
    for row in range(ROWS):
        assert packed[row, : mask[row].sum()].tolist() == x[row, mask[row]].tolist()


@laws
@given(mask=masks)
def test_unpacking_brings_every_token_back_and_leaves_zero_at_padding(backend, packing, mask):
    mask = np.array(mask)
    made = packing.make_packing(backend.array(mask))
    x = 1 + np.arange(ROWS * TOKENS * WIDTH, dtype=np.float32).reshape(ROWS, TOKENS, WIDTH)
    back = backend.numpy(packing.unpack(packing.pack(backend.array(x), made), made))
    assert back.tolist() == np.where(mask[..., None], x, 0).tolist()


@laws
@given(mask=masks)
def test_attentions_come_back_to_the_columns_of_queries_and_keys(backend, packing, mask):
    """Weights that name their packed query and key are found, unpacked, at the columns of those tokens."""
    mask = np.array(mask)
    made = packing.make_packing(backend.array(mask))
    names = 1 + np.arange(TOKENS * TOKENS, dtype=np.float32).reshape(TOKENS, TOKENS)
    weights = np.broadcast_to(names, (ROWS, 1, TOKENS, TOKENS)).copy()
    back = backend.numpy(packing.unpack_attentions(backend.array(weights), made, keys_too=True))
    for row in range(ROWS):
        real, count = mask[row], mask[row].sum()
        assert back[row, 0][real][:, real].tolist() == names[:count, :count].tolist()
        assert not back[row, 0, ~real].any()


def test_without_a_packing_nothing_moves(backend, packing):
    x = backend.array(np.arange(ROWS * TOKENS * WIDTH, dtype=np.float32).reshape(ROWS, TOKENS, WIDTH))
    assert np.array_equal(packing.pack(x, None), x)
    assert np.array_equal(packing.unpack(x, None), x)
