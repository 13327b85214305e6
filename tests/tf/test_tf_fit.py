"""Training the Keras way: `compile`, `fit` and `evaluate` with callbacks, policies, XLA, our optimizer, adapters."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from harness import BATCH, BOUND, ROUNDOFF, config_of, load_backend, mask_named, reference_of, token_ids

from opt_core.lora import LoraConfig
from opt_core.optimization import TrainingRecipe
from opt_core.reference import causal_lm_loss
from opt_tf import TFOPTForCausalLM
from opt_tf.lora import add_lora
from opt_tf.optimization import AdamW, make_optimizer
from opt_tf.training import Trainer

# The epsilon keeps gradients that are zero but for rounding from becoming steps.
CONSTANT = TrainingRecipe(learning_rate=0.02, epsilon=1e-3, max_gradient_norm=0.7)
VARYING = TrainingRecipe(learning_rate=0.02, epsilon=1e-3, max_gradient_norm=0.7, warmup_steps=2, total_steps=7)


def a_model(dtype=None, **changes) -> TFOPTForCausalLM:
    changes = {"num_hidden_layers": 1, **changes}
    return (
        load_backend("tf").random_model(config_of("350m style", **changes)) if dtype is None else _cast(dtype, changes)
    )


def _cast(dtype: str, changes: dict) -> TFOPTForCausalLM:
    model = TFOPTForCausalLM(config_of("350m style", **changes), dtype=dtype)
    for weight, value in zip(model.weights, a_model(**changes).weights, strict=True):
        weight.assign(value)
    return model


def a_batch() -> dict[str, np.ndarray]:
    ids = token_ids(config_of())
    return {"input_ids": ids, "attention_mask": mask_named("right"), "labels": ids}


def fit(model, epochs: int = 3, callbacks=(), **options) -> list[float]:
    """The loss of each epoch, which is one step."""
    data = tf.data.Dataset.from_tensors(a_batch())
    history = model.fit(data, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks), **options)
    return history.history["loss"]


def assert_same_weights(got, want, atol: float = 0) -> None:
    for mine, theirs in zip(got.weights, want.weights, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=0, atol=atol, err_msg=mine.path)


# -- the optimizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "jit_compile"), [(CONSTANT, False), (VARYING, True)], ids=["constant, graph", "schedule, xla"]
)
def test_fit_takes_the_steps_of_the_trainer(recipe, jit_compile):
    fitted, stepped = a_model(), a_model()
    fitted.compile(AdamW(recipe), jit_compile=jit_compile)
    trainer = Trainer(stepped, recipe)
    np.testing.assert_allclose(fit(fitted), [trainer.step(a_batch()) for _ in range(3)], rtol=1e-5)
    assert_same_weights(fitted, stepped, atol=1e-5)


def test_accumulated_gradients_are_one_step_of_the_recipe():
    plain, accumulated = a_model(), a_model()
    plain.compile(AdamW(VARYING), jit_compile=False)
    accumulated.compile(AdamW(VARYING, gradient_accumulation_steps=2), jit_compile=False)
    fit(plain, epochs=2)
    fit(accumulated, epochs=4)  # the same batch twice has its own gradient as the mean
    assert_same_weights(accumulated, plain, atol=1e-5)


def test_the_optimizer_goes_through_a_keras_file(tmp_path):
    model = a_model()
    model.compile(AdamW(VARYING), jit_compile=False)
    fit(model, epochs=2)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again.optimizer, AdamW)
    assert again.optimizer.recipe == VARYING
    assert fit(again, epochs=2) == pytest.approx(fit(model, epochs=2), rel=1e-6)
    assert_same_weights(again, model, atol=1e-6)


def test_a_constant_rate_can_be_set_and_is_kept_in_the_config():
    optimizer = make_optimizer(a_model(), CONSTANT)
    optimizer.learning_rate = 0.25
    assert AdamW.from_config(optimizer.get_config()).recipe.learning_rate == 0.25


def test_biases_and_norms_are_not_decayed():
    model = a_model()
    optimizer = make_optimizer(model, CONSTANT)
    kept = {v.path.rpartition("/")[2] for v in model.trainable_variables if not optimizer._use_weight_decay(v.value)}
    decayed = [v for v in model.trainable_variables if optimizer._use_weight_decay(v.value)]
    assert kept == {"bias", "weight"}  # the weights of norms
    assert {len(v.shape) for v in decayed} == {2}


# -- callbacks --------------------------------------------------------------------------------------------------------


def test_a_scheduler_sets_the_rate_and_early_stopping_stops():
    model = a_model()
    model.compile(AdamW(CONSTANT), jit_compile=False)
    rates = []
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.0 if epoch else rate)
    seen = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: rates.append(float(model.optimizer.learning_rate)))
    stopper = keras.callbacks.EarlyStopping(monitor="loss", patience=2, min_delta=1e-6)
    losses = fit(model, epochs=9, callbacks=[scheduler, seen, stopper])
    assert rates[:2] == pytest.approx([CONSTANT.learning_rate, 0.0])
    assert len(losses) == 4  # after the second epoch nothing changes
    assert losses[2] == losses[3]


def test_checkpoints_of_weights_keep_the_best_model(tmp_path):
    model = a_model()
    model.compile(AdamW(CONSTANT), jit_compile=False)
    path = tmp_path / "best.weights.h5"
    fit(model, callbacks=[keras.callbacks.ModelCheckpoint(path, save_weights_only=True)])
    again = a_model()
    again.load_weights(path)
    assert_same_weights(again, model)
    model.compile(AdamW(CONSTANT), jit_compile=False)
    assert model.evaluate(a_batch(), batch_size=BATCH, verbose=0) == pytest.approx(
        float(again(a_batch()).loss), rel=1e-5
    )


def test_a_fit_that_was_interrupted_goes_on(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                raise InterruptedError

    unbroken, broken, resumed = (a_model() for _ in range(3))
    for model in (unbroken, broken, resumed):
        model.compile(AdamW(VARYING), jit_compile=False)
    want = fit(unbroken, epochs=5)
    with pytest.raises(InterruptedError):
        fit(broken, epochs=5, callbacks=[keras.callbacks.BackupAndRestore(tmp_path), Interrupt()])
    got = fit(resumed, epochs=5, callbacks=[keras.callbacks.BackupAndRestore(tmp_path)])
    assert got == pytest.approx(want[-len(got) :], rel=1e-5)
    assert 0 < len(got) < 5
    assert_same_weights(resumed, unbroken, atol=1e-6)


# -- policies, recomputation, seeds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_mixed_policy_trains_float32_weights_in_half_precision(policy):
    half = policy.removeprefix("mixed_")
    model, batch = a_model(policy), a_batch()
    reference = reference_of(model.config)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    truth = causal_lm_loss(reference.logits(reference(ids, mask).last_hidden_state), ids, mask)
    assert float(model(batch).loss) == pytest.approx(truth, rel=BOUND[half] * ROUNDOFF[half])
    with tf.GradientTape() as tape:
        loss = model(batch, training=True).loss
    gradients = tape.gradient(loss, [w.value for w in model.trainable_weights])
    assert loss.dtype == tf.float32
    assert {tf.convert_to_tensor(g).dtype for g in gradients} == {tf.float32}
    model.compile(AdamW(CONSTANT), jit_compile=False)
    losses = fit(model, epochs=4)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (half == "float16")
    assert losses[-1] < losses[0] - 0.1
    assert {w.dtype for w in model.weights} == {"float32"}


@pytest.mark.slow
def test_recomputed_layers_take_the_same_steps_under_xla():
    plain, recomputing = (a_model(dropout=0.2, attention_dropout=0.1, num_hidden_layers=2) for _ in range(2))
    recomputing.gradient_checkpointing_enable()
    for model in (plain, recomputing):
        model.seed_generator.state.assign([3, 5])
        model.compile(AdamW(CONSTANT), jit_compile=True)
    np.testing.assert_allclose(fit(recomputing), fit(plain), rtol=1e-5)
    assert_same_weights(recomputing, plain, atol=1e-5)


def test_the_state_of_dropout_is_no_weight_and_in_no_file(tmp_path):
    model = a_model(dropout=0.1)
    assert not any("seed" in w.path for w in model.weights)
    prefix = tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
    assert not any("seed" in name for name, _ in tf.train.list_variables(prefix))
    state = model.seed_generator.state.numpy()
    model(a_batch())
    np.testing.assert_array_equal(model.seed_generator.state, state)  # evaluation draws nothing
    model(a_batch(), training=True)
    assert (model.seed_generator.state.numpy() != state).any()


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_fit_trains_an_adapter_alone_and_a_keras_file_keeps_it(tmp_path):
    model, untouched = a_model(), a_model()
    add_lora(model, LoraConfig(r=3, target_modules=("q_proj", "fc2")))
    assert {v.path.rpartition("/")[2] for v in model.trainable_variables} == {"lora_A", "lora_B"}
    model.compile(AdamW(CONSTANT), jit_compile=False)
    losses = fit(model, epochs=4)
    assert losses[-1] < losses[0]
    for weight in untouched.weights:
        mine = next(w for w in model.weights if w.path == weight.path)
        np.testing.assert_array_equal(mine.numpy(), weight.numpy(), err_msg=weight.path)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.lora == model.lora
    np.testing.assert_array_equal(again(a_batch()).logits, model(a_batch()).logits)


def test_a_layer_takes_an_adapter_as_those_of_keras_do():
    model = a_model()
    layer, ids = model.model.decoder.layers[0].fc1, token_ids(model.config)
    before = model(ids).logits.numpy()
    layer.enable_lora(3)
    assert layer.lora_enabled
    assert layer.trainable_weights == [layer.bias, layer.lora_A, layer.lora_B]  # as Keras' Dense has it
    np.testing.assert_array_equal(model(ids).logits, before)
    layer.lora_B.assign(tf.ones_like(layer.lora_B))
    assert np.abs(model(ids).logits.numpy() - before).max() > 1e-3
    with pytest.raises(ValueError, match="without an adapter"):
        layer.enable_lora(3)
