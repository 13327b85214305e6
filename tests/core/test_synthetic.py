"""Random checkpoints: whole, repeatable, and without the zeros and ones that hide mistakes."""

import numpy as np
import pytest

from opt_core import OPTConfig
from opt_core.schema import TASKS, shapes
from opt_core.synthetic import random_tensors

TINY = dict(
    vocab_size=101, hidden_size=22, num_hidden_layers=2, ffn_dim=31, max_position_embeddings=37, num_attention_heads=2
)


@pytest.mark.parametrize("task", TASKS)
def test_every_weight_of_the_schema_gets_float32_values_of_its_shape(task):
    config = OPTConfig(**TINY, word_embed_proj_dim=13, tie_word_embeddings=False, num_labels=3)
    tensors = dict(random_tensors(config, task))
    assert {name: array.shape for name, array in tensors.items()} == shapes(config, task)
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}


def test_no_value_is_zero_or_one_and_no_two_tensors_share_values():
    tensors = dict(random_tensors(OPTConfig(**TINY)))
    values = np.concatenate([array.ravel() for array in tensors.values()])
    assert not np.isin(values, (0, 1)).any()
    assert len({array.ravel()[0].item() for array in tensors.values()}) == len(tensors)


def test_a_tensor_depends_on_the_seed_and_on_its_name_but_not_on_the_other_tensors():
    few, many = OPTConfig(**TINY), OPTConfig(**TINY).replace(num_hidden_layers=5, enable_bias=False)
    first, again, other = (dict(random_tensors(few, seed=seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)
    deeper = dict(random_tensors(many, seed=3))
    shared = first.keys() & deeper.keys()
    assert shared
    assert all(np.array_equal(first[name], deeper[name]) for name in shared)
