"""The published TensorFlow and Flax classes, which later versions dropped, against the reference at real tokens.

They run on Keras 2 (`tf_keras`) and `flax.linen`, beside our Keras 3 and NNX models in one process; the tests prove
that too, by running both. Not compared is what the published TensorFlow class ignores (an untied head, absent biases,
norms without weights, given positions; the Flax class ignores the second and third as well).
"""

import numpy as np
import pytest
from harness import (
    BOUND,
    ROUNDOFF,
    config_of,
    load_backend,
    mask_named,
    reference_of,
    save_random,
    token_ids,
    worst_row,
)

transformers = pytest.importorskip("transformers")

FLOAT32_BOUND = BOUND["float32"] * ROUNDOFF["float32"]
VARIANTS = ["pre-norm", "350m style"]
MASKS = ["none", "left", "right", "holes"]


@pytest.fixture(params=["tf", "flax"])
def framework(request) -> str:
    if request.param not in request.config.getoption("--backends").split(","):
        pytest.skip(f"{request.param} is not among the --backends of this run")
    return request.param


def published_model(framework: str, folder):
    if framework == "tf":
        pytest.importorskip("tf_keras")
        return transformers.TFOPTForCausalLM.from_pretrained(folder, from_pt=True)
    return transformers.FlaxOPTForCausalLM.from_pretrained(folder, from_pt=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_published_class_of_the_framework_agrees_with_the_reference_and_with_ours(framework, variant, tmp_path):
    config = config_of(variant)
    save_random(tmp_path, config)
    published, ours = published_model(framework, tmp_path), load_backend(framework).random_model(config)
    reference, ids = reference_of(config), token_ids(config)
    for name in MASKS:
        mask = mask_named(name)
        real = np.ones(ids.shape, bool) if mask is None else mask == 1
        given = None if mask is None else mask.astype(np.int32)
        theirs = np.asarray(published(ids.astype(np.int32), attention_mask=given).logits, np.float64)
        mine = load_backend(framework).numpy(ours(ids, mask).logits)
        truth = reference.logits(reference(ids, mask).last_hidden_state)
        assert worst_row(theirs[real], truth[real]) <= FLOAT32_BOUND, name
        assert worst_row(mine[real], theirs[real]) <= 2 * FLOAT32_BOUND, name


@pytest.mark.slow
def test_the_published_class_of_the_framework_continues_a_left_padded_batch_as_ours_does(framework, tmp_path):
    config = config_of()  # the published Flax class cannot do without an id that ends texts
    save_random(tmp_path, config)
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    ids = np.where(mask, token_ids(config, *mask.shape), config.pad_token_id).astype(np.int32)
    out = published_model(framework, tmp_path).generate(
        ids, attention_mask=mask.astype(np.int32), max_new_tokens=7, do_sample=False
    )
    theirs = np.asarray(getattr(out, "sequences", out))
    ours = load_backend(framework).random_model(config).generate(ids, mask, max_new_tokens=7)
    assert load_backend(framework).numpy(ours).tolist() == theirs.tolist()
