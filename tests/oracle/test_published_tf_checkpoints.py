"""The published TensorFlow classes and tf.train.Checkpoint: what they save is read, what is written they restore."""

import numpy as np
import pytest
from harness import config_of, rounded_weights, save_random, token_ids

from conversion import open_checkpoint, write_checkpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("tf_keras")

CONFIG = config_of("350m style", do_layer_norm_before=True)


@pytest.fixture(autouse=True)
def only_with_tensorflow(request):
    if "tf" not in request.config.getoption("--backends").split(","):
        pytest.skip("tf is not among the --backends of this run")


@pytest.fixture(params=["TFOPTForCausalLM", "TFOPTModel"])
def published(request, tmp_path):
    save_random(tmp_path / "source", CONFIG)
    return getattr(transformers, request.param).from_pretrained(tmp_path / "source", from_pt=True)


def assert_is_read(path):
    with open_checkpoint(path, config=CONFIG, verify=True) as checkpoint:
        checkpoint.check()
        for name, expected in rounded_weights(CONFIG).items():
            np.testing.assert_array_equal(checkpoint.read(name), expected, err_msg=name)


def test_what_the_published_classes_save_is_read(published, tmp_path):
    import tensorflow as tf

    tf.train.Checkpoint(model=published).write(str(tmp_path / "written"))
    tf.train.Checkpoint(published).save(str(tmp_path / "saved"))
    published.save_weights(str(tmp_path / "weights"))
    for name in ("written.index", "saved-1.index", "weights.index"):
        assert_is_read(tmp_path / name)


@pytest.mark.slow
def test_the_variables_of_a_published_saved_model_are_read(published, tmp_path):
    """Their keys are numbers; the object graph beside them has the names."""
    published.save_pretrained(tmp_path, saved_model=True)
    assert_is_read(tmp_path / "saved_model" / "1")


def test_the_published_classes_restore_what_is_written(published, tmp_path):
    import tensorflow as tf

    write_checkpoint(tmp_path, CONFIG, rounded_weights(CONFIG), format="tf-checkpoint-published")
    ids = tf.constant(token_ids(CONFIG), tf.int32)
    want = published(ids)[0].numpy()
    prefix = tf.train.latest_checkpoint(tmp_path)
    for restore in (tf.train.Checkpoint(published).restore, published.load_weights):
        for variable in published.trainable_variables:
            variable.assign(tf.zeros_like(variable))
        assert not np.allclose(published(ids)[0], want)
        restore(prefix).assert_existing_objects_matched()
        np.testing.assert_array_equal(published(ids)[0], want)
