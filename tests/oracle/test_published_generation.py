"""Greedy text against `generate` of the published PyTorch class, token by token."""

import numpy as np
import pytest
from harness import config_of, token_ids
from published_models import our_model, published_model, torch

PROMPTS = np.array([[int(c) for c in row] for row in ("1111111", "0001111", "0000001")])


def prompts(config) -> np.ndarray:
    """Ragged prompts, left-padded."""
    return np.where(PROMPTS, token_ids(config, *PROMPTS.shape), config.pad_token_id)


def published_text(config, ids, mask, **options) -> np.ndarray:
    mask = None if mask is None else torch.tensor(mask)
    model = published_model(config, dtype=torch.float32)
    return model.generate(torch.tensor(ids), attention_mask=mask, do_sample=False, **options).numpy()


@pytest.mark.parametrize("variant", ["pre-norm", "350m style", "untied head", "galactica style"])
def test_a_left_padded_batch_continues_as_the_published_model_continues_it(backend, variant):
    config = config_of(variant, eos_token_id=None)
    ids = prompts(config)
    published = published_text(config, ids, PROMPTS, max_new_tokens=17)
    ours = backend.numpy(our_model(backend, variant, eos_token_id=None).generate(ids, PROMPTS, max_new_tokens=17))
    assert ours.tolist() == published.tolist()
    assert len(np.unique(published[:, -17:])) > 3  # a text that repeats one token would prove little


def test_padding_is_inferred_from_its_id_as_published(backend):
    """The published Flax class does not infer it and continues from padding."""
    config = config_of(eos_token_id=None)
    ids = prompts(config)
    published = published_text(config, ids, None, max_new_tokens=5)
    ours = backend.numpy(our_model(backend, "pre-norm", eos_token_id=None).generate(ids, max_new_tokens=5))
    assert ours.tolist() == published.tolist()


@pytest.mark.parametrize("several", [False, True])
def test_a_text_ends_where_the_published_one_ends(backend, several):
    """At one id, or at the first of several; what follows holds the padding id."""
    config = config_of(eos_token_id=None)
    ids, model = prompts(config), our_model(backend, "pre-norm", eos_token_id=None)
    free = backend.numpy(model.generate(ids, PROMPTS, max_new_tokens=11))[:, -11:]
    eos = [int(free[0, 3]), int(free[1, 6])] if several else int(free[0, 3])
    options = dict(eos_token_id=eos, max_new_tokens=11)
    ours = backend.numpy(model.generate(ids, PROMPTS, **options))
    assert ours.tolist() == published_text(config, ids, PROMPTS, **options).tolist()
    assert (ours[0, -7:] == config.pad_token_id).all() or ours.shape[1] < 18


def test_twenty_new_tokens_are_made_where_the_published_class_makes_twenty(backend):
    """The published TensorFlow and Flax classes count the prompt among their twenty; PyTorch's rule holds here."""
    config = config_of(eos_token_id=None)
    ids = prompts(config)
    ours = backend.numpy(our_model(backend, "pre-norm", eos_token_id=None).generate(ids, PROMPTS))
    assert ours.tolist() == published_text(config, ids, PROMPTS).tolist()
    assert ours.shape[1] == 27


def test_the_whole_length_can_be_bounded_as_published(backend):
    config = config_of(eos_token_id=None)
    ids = prompts(config)
    ours = backend.numpy(our_model(backend, "pre-norm", eos_token_id=None).generate(ids, PROMPTS, max_length=12))
    assert ours.tolist() == published_text(config, ids, PROMPTS, max_length=12).tolist()
