"""A model is a Python object like others: it can be copied and pickled, and a copy has a life of its own."""

import copy
import pickle

import numpy as np
import pytest
from harness import config_of, token_ids

WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", ["untied head", "gelu", "gelu_new", "silu"])
def test_a_copy_computes_the_same(backend, way, variant):
    model = backend.random_model(config_of(variant))
    ids = token_ids(model.config)
    twin = WAYS[way](model)
    np.testing.assert_array_equal(backend.numpy(twin(ids).logits), backend.numpy(model(ids).logits))


@pytest.mark.parametrize("way", WAYS)
def test_a_change_of_a_copy_leaves_the_original_alone(backend, way):
    model = backend.random_model(config_of())
    ids = token_ids(model.config)
    before = backend.numpy(model.generate(ids, max_new_tokens=3))  # a model that has generated holds compiled functions
    twin = WAYS[way](model)
    twin.resize_token_embeddings(101)
    assert backend.numpy(twin(ids).logits).shape[-1] == 101
    assert model.config.vocab_size == 97
    np.testing.assert_array_equal(backend.numpy(model.generate(ids, max_new_tokens=3)), before)
