"""What Keras users expect: fit, evaluate, predict, policies, saving, a model in a model; and clear errors."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from harness import BATCH, LENGTH, config_of, mask_named, token_ids

from opt_core.errors import InputError, KeywordError
from opt_core.schema import parameter_count
from opt_tf import (
    TFOPTForCausalLM,
    TFOPTForQuestionAnswering,
    TFOPTForSequenceClassification,
    TFOPTModel,
)

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def same_random_numbers():
    keras.utils.set_random_seed(0)


def a_batch(labels: bool = True) -> dict[str, np.ndarray]:
    ids = token_ids(config_of())
    batch = {"input_ids": ids, "attention_mask": mask_named("left")}
    return {**batch, "labels": ids} if labels else batch


def test_fit_with_labels_among_the_inputs_lowers_the_models_own_loss():
    model = TFOPTForCausalLM(config_of(dropout=0.1))
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    before = model.evaluate(a_batch(), batch_size=BATCH, verbose=0)
    assert before == pytest.approx(float(model(a_batch()).loss), rel=1e-5)
    history = model.fit(a_batch(), batch_size=BATCH, epochs=5, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert model.evaluate(a_batch(), batch_size=BATCH, verbose=0) < before


def test_fit_with_a_keras_loss_trains_on_the_logits():
    model = TFOPTForSequenceClassification(config_of(num_labels=3))
    classes = np.array([0, 1, 2, 1])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    history = model.fit(a_batch(labels=False), classes, batch_size=2, epochs=1, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert 0 <= history["accuracy"][0] <= 1
    loss, accuracy = model.evaluate(a_batch(labels=False), classes, batch_size=BATCH, verbose=0)
    out = model(a_batch(labels=False), labels=classes)
    assert loss == pytest.approx(float(out.loss), rel=1e-5)
    assert accuracy == np.mean(out.logits.numpy().argmax(-1) == classes)


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (TFOPTModel, {"last_hidden_state"}),
        (TFOPTForCausalLM, {"logits"}),
        (TFOPTForSequenceClassification, {"logits"}),
        (TFOPTForQuestionAnswering, {"start_logits", "end_logits"}),
    ],
)
def test_predict_gathers_the_outputs_of_all_batches_by_name(model_class, fields):
    model, batch = model_class(config_of()), a_batch(labels=False)
    got, want = model.predict(batch, batch_size=3, verbose=0), model(batch)
    assert got.keys() == fields
    for name in fields:
        np.testing.assert_allclose(got[name], getattr(want, name), atol=2e-6)


def test_gradients_of_fit_are_those_of_the_loss():
    """One step of plain gradient descent moves each weight by its gradient."""
    model = TFOPTForCausalLM(config_of())
    weights = model.trainable_variables
    with tf.GradientTape() as tape:
        loss = model(a_batch()).loss
    gradients = tape.gradient(loss, [w.value for w in weights])
    want = [w.numpy() - 0.5 * tf.convert_to_tensor(g).numpy() for w, g in zip(weights, gradients, strict=True)]
    model.compile(optimizer=keras.optimizers.SGD(0.5))
    model.fit(a_batch(), batch_size=BATCH, epochs=1, verbose=0)
    for weight, value in zip(weights, want, strict=True):
        np.testing.assert_allclose(weight.numpy(), value, atol=1e-5, err_msg=weight.path)


def test_training_turns_dropout_on_and_an_outer_model_passes_it_down():
    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.opt = TFOPTModel(config_of(dropout=0.5))

        def call(self, ids):
            return self.opt(ids).last_hidden_state

    outer, ids = Outer(), token_ids(config_of())
    quiet = outer(ids)
    np.testing.assert_array_equal(quiet, outer.opt(ids).last_hidden_state)
    assert not np.allclose(quiet, outer(ids, training=True))
    assert len(outer.weights) == len(outer.opt.weights)


def test_a_mixed_policy_keeps_float32_weights_and_computes_in_bfloat16():
    model = TFOPTForCausalLM(config_of("350m style"), dtype="mixed_bfloat16")
    assert {w.dtype for w in model.weights} == {"float32"}
    out = model(a_batch(), output_hidden_states=True)
    assert out.logits.dtype == out.hidden_states[1].dtype == out.past_key_values.keys[0].dtype == tf.bfloat16
    assert out.loss.dtype == tf.float32
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    history = model.fit(a_batch(), batch_size=BATCH, epochs=4, verbose=0).history["loss"]
    assert history[-1] < history[0]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", keras.DTypePolicy("mixed_bfloat16")], ids=["name", "policy"])
def test_a_checkpoint_is_loaded_under_a_mixed_policy(policy, tmp_path):
    model = TFOPTForCausalLM(config_of())
    model.save_pretrained(tmp_path)
    again = TFOPTForCausalLM.from_pretrained(tmp_path, dtype=policy)
    assert again(a_batch()).logits.dtype == tf.bfloat16
    for mine, loaded in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(mine, loaded)
    with pytest.raises(InputError, match=r"dtype: .*mixed_int8"):
        TFOPTForCausalLM.from_pretrained(tmp_path, dtype="mixed_int8")


def test_the_global_policy_is_the_default():
    keras.config.set_dtype_policy("bfloat16")
    try:
        assert {w.dtype for w in TFOPTModel(config_of()).weights} == {"bfloat16"}
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("variant", ["pre-norm", "350m style", "untied head", "galactica style"])
def test_a_keras_file_brings_the_model_back(variant, tmp_path):
    model = TFOPTForCausalLM(config_of(variant), attn_implementation="eager")
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.config == model.config
    assert again.attn_implementation == "eager"
    np.testing.assert_array_equal(again(a_batch()).logits, model(a_batch()).logits)


def test_weights_have_their_published_names_as_paths():
    model = TFOPTForCausalLM(config_of())
    paths = {w.path for w in model.weights}
    assert "model/decoder/layers/1/self_attn/q_proj/bias" in paths
    assert len(paths) == len(model.weights)


def test_frozen_embeddings_stay_and_are_not_counted():
    model = TFOPTForCausalLM(config_of())
    total = model.num_parameters()
    embeddings = model.get_input_embeddings()
    embeddings.trainable = False
    assert model.num_parameters(only_trainable=True) == total - embeddings.weight.numpy().size
    model.compile(optimizer=keras.optimizers.SGD(0.5))
    before = embeddings.weight.numpy()
    model.fit(a_batch(), batch_size=BATCH, epochs=1, verbose=0)
    np.testing.assert_array_equal(embeddings.weight.numpy(), before)


def test_resizing_after_fit_trains_and_generates_with_the_new_vocabulary():
    model = TFOPTForCausalLM(config_of())
    model.compile(optimizer="sgd")
    model.fit(a_batch(), batch_size=BATCH, verbose=0)
    model.generate(token_ids(config_of()), max_new_tokens=2)
    model.resize_token_embeddings(101)
    weight = model.get_input_embeddings().weight
    weight.assign(weight[::-1])  # a program compiled before would use the old rows
    assert model.num_parameters() == parameter_count(model.config) == TFOPTForCausalLM(model.config).num_parameters()
    new = model.generate(token_ids(config_of()), max_new_tokens=1)[:, -1]
    np.testing.assert_array_equal(new, model(token_ids(config_of())).logits[:, -1].numpy().argmax(-1))
    model.compile(optimizer="sgd")
    ids = np.full((BATCH, LENGTH), 100)
    assert np.isfinite(model.fit({"input_ids": ids, "labels": ids}, batch_size=BATCH, verbose=0).history["loss"]).all()


def test_arguments_come_by_position_by_keyword_or_as_a_dict():
    model, batch = TFOPTForCausalLM(config_of()), a_batch()
    ids, mask, labels = batch.values()
    want = model(batch)
    embeds = model.get_input_embeddings()(tf.constant(ids))
    for got in (
        model(ids, mask, labels=labels),
        model(input_ids=ids, attention_mask=mask, labels=labels),
        model({"input_ids": ids}, attention_mask=mask, labels=labels),
        model(ids.tolist(), mask.astype(bool), labels=labels.astype(np.int32)),
        model(inputs_embeds=embeds.numpy().astype(np.float64), attention_mask=mask, labels=labels),
    ):
        np.testing.assert_allclose(got.logits, want.logits, atol=1e-6)
        np.testing.assert_allclose(got.loss, want.loss, rtol=1e-6)


def test_errors_pass_through_keras_as_they_are():
    model = TFOPTForCausalLM(config_of())
    with pytest.raises(KeywordError, match=r"^invalid arguments: atention_mask: unknown keyword; did you mean atten"):
        model(token_ids(config_of()), atention_mask=np.ones(3))
    with pytest.raises(InputError, match=r"^invalid arguments: input_ids: expected 0 to 96"):
        model(np.full((1, 3), 97))
    with pytest.raises(InputError, match=r"^invalid arguments: labels: expected shape"):
        model(token_ids(config_of()), labels=np.zeros((1, 1), int))


@pytest.mark.parametrize("loaded", [True, False])
def test_another_keras_backend_is_refused_by_name(loaded):
    code = f"{'import keras; ' if loaded else ''}import opt_tf"
    env = {**os.environ, "KERAS_BACKEND": "numpy"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: opt_tf needs")
    assert "tensorflow" in last
    assert "numpy" in last
