"""Trains a model on one device, or on two virtual ones under a MirroredStrategy, and leaves what it got.

python train_mirrored.py FOLDER CASE ...    # with a checkpoint in FOLDER/model; the test does it on one device
"""

import contextlib
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from harness import VARIANTS, mask_named, token_ids

from opt_core import OPTConfig
from opt_core.errors import InputError
from opt_core.optimization import TrainingRecipe
from opt_core.reference import IGNORED_LABEL
from opt_tf import TFOPTForCausalLM, TFOPTForQuestionAnswering, TFOPTForSequenceClassification
from opt_tf.optimization import AdamW, make_optimizer
from opt_tf.training import Trainer

SIZES = dict(vocab_size=97, hidden_size=5 * 7, num_hidden_layers=1, ffn_dim=53, num_attention_heads=5, dropout=0.0)
CONFIG = OPTConfig(**SIZES | VARIANTS["350m style"] | dict(max_position_embeddings=41))
# The epsilon keeps gradients that are zero but for rounding from becoming steps.
RECIPE = TrainingRecipe(learning_rate=0.02, epsilon=1e-3, max_gradient_norm=0.7, warmup_steps=2, total_steps=9)
STEPS = 5


def batch_of() -> dict[str, np.ndarray]:
    """Four rows of which the second predicts nothing and the first little: a mean of means is another number."""
    ids = token_ids(CONFIG)
    labels = ids.copy()
    labels[0, 3:] = labels[1] = IGNORED_LABEL
    return {"input_ids": ids, "attention_mask": mask_named("right"), "labels": labels}


class Run:
    """One device, or a strategy: `scope` is where models are made."""

    def __init__(self, folder: Path, strategy: tf.distribute.Strategy | None = None):
        self.folder, self.scope = folder, contextlib.nullcontext if strategy is None else strategy.scope

    def model(self, **changes) -> TFOPTForCausalLM:
        with self.scope():
            return TFOPTForCausalLM.from_pretrained(self.folder / "model", **changes)

    def compiled(self, **changes) -> TFOPTForCausalLM:
        model = self.model(**changes)
        model.compile(make_optimizer(model, RECIPE), jit_compile=False)
        return model

    def fit(self, model, batch: dict | None = None, rows: int = 4, **options) -> list[float]:
        batch = batch_of() if batch is None else batch
        options = dict(epochs=STEPS, batch_size=rows, shuffle=False, verbose=0) | options
        return model.fit(batch, **options).history["loss"]


def fitted(run: Run) -> dict[str, np.ndarray]:
    """Batches of three rows and of one, which one replica of two has not; what the model then computes; saved."""
    model, batch = run.compiled(), batch_of()
    found = {"losses": run.fit(model, rows=3), **weights_of(model)}
    found["loss"] = model.evaluate(batch, batch_size=4, verbose=0)
    ids = {name: x for name, x in batch.items() if name != "labels"}
    found["logits"] = model.predict(ids, batch_size=3, verbose=0)["logits"]
    found["tokens"] = model.generate(ids["input_ids"][:2], max_new_tokens=5)
    model.save_pretrained(run.folder / "saved")
    saved = TFOPTForCausalLM.from_pretrained(run.folder / "saved")
    return found | {f"saved {name}": x for name, x in weights_of(saved).items()}


def stepped(run: Run) -> dict[str, np.ndarray]:
    """Steps of the Trainer, and its other numbers."""
    trainer = Trainer(run.model(), RECIPE)
    numbers = [(trainer.step(batch_of()), trainer.gradient_norm) for _ in range(STEPS)]
    found = {"losses and norms": numbers, "loss": trainer.evaluate(batch_of()), **weights_of(trainer.model)}
    return found | {"logits": trainer.predict(batch_of()).logits}


def stepped_in_parts(run: Run) -> dict[str, np.ndarray]:
    """Steps of the Trainer by parts of the batch, over a save."""
    first, again = (Trainer(run.model(), RECIPE, accumulate=2) for _ in range(2))
    numbers = [first.step(batch_of()) for _ in range(2)]
    first.save(run.folder / "run")
    again.restore(run.folder / "run")
    return {"losses": [*numbers, again.step(batch_of())], **weights_of(again.model)}


def other_heads(run: Run) -> dict[str, np.ndarray]:
    """A classifier and one that answers questions, in the Trainer and in `fit`: labels are left out in the first rows.

    Some starts and ends are at padding, so that they count unequally often.
    """
    found, ids, mask = {}, token_ids(CONFIG), mask_named("right")
    for model_class, labels in (
        (TFOPTForSequenceClassification, dict(labels=np.array([IGNORED_LABEL, 1, 2, 0]))),
        (
            TFOPTForQuestionAnswering,
            dict(start_positions=np.array([11, 14, 0, 2]), end_positions=np.array([11, 3, 0, 9])),
        ),
    ):
        for way in ("stepped", "fitted"):
            keras.utils.set_random_seed(0)  # of the head, which the checkpoint has not
            with run.scope():
                model = model_class.from_pretrained(run.folder / "model", num_labels=3)
            batch = dict(input_ids=ids, attention_mask=mask) | labels
            if way == "stepped":
                trainer = Trainer(model, RECIPE)
                numbers = [(trainer.step(batch), trainer.gradient_norm) for _ in range(2)], trainer.evaluate(batch)
                found[f"{model.task} losses, norms, an evaluation"] = np.hstack([np.ravel(x) for x in numbers])
            else:
                model.compile(make_optimizer(model, RECIPE), jit_compile=False)
                found[f"{model.task} losses of fit"] = run.fit(model, batch, epochs=2)
            found |= {f"{model.task} {way} {name}": x for name, x in weights_of(model).items()}
    return found


def other_losses(run: Run) -> dict[str, np.ndarray]:
    """A Keras loss with a metric; half precision, whose loss is scaled."""
    ids, options = token_ids(CONFIG), dict(epochs=2, batch_size=4, verbose=0)
    with run.scope():
        model = run.model()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    found = model.fit({"input_ids": ids}, ids, **options).history
    half = run.compiled(dtype="mixed_float16")
    return found | {"losses of mixed_float16": run.fit(half, epochs=3)}


def weights_of(model) -> dict[str, np.ndarray]:
    return {weight.path: weight.numpy() for weight in model.weights}


# -- what only replicas have ------------------------------------------------------------------------------------------


def callbacks(run: Run) -> dict[str, np.ndarray]:
    """Weights and a model that callbacks kept, loaded on one device; a fit that was interrupted, and goes on."""
    model, folder = run.compiled(), run.folder
    keep = keras.callbacks.ModelCheckpoint
    kept = [keep(folder / "kept.weights.h5", save_weights_only=True), keep(folder / "kept.keras")]

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                raise InterruptedError

    def backup():
        return keras.callbacks.BackupAndRestore(folder / "backup")

    with contextlib.suppress(InterruptedError):
        run.fit(model, callbacks=[*kept, backup(), Interrupt()])
    single = Run(folder).model()
    single.load_weights(folder / "kept.weights.h5")
    whole = keras.saving.load_model(folder / "kept.keras")
    found = {"weights equal": [np.array_equal(a, b) for a, b in zip(single.weights, model.weights, strict=True)]}
    found["model equal"] = [np.array_equal(a, b) for a, b in zip(whole.weights, model.weights, strict=True)]
    resumed = run.compiled()
    return found | {"whole": run.fit(run.compiled()), "resumed": run.fit(resumed, callbacks=[backup()])}


def outputs_in_training(run: Run) -> dict[str, np.ndarray]:
    """Logits of each replica for the same row, twice, with dropout."""
    model = run.model(dropout=0.5)
    strategy = model.distribute_strategy
    row = tf.constant(token_ids(CONFIG, batch=1))
    replicas = tf.function(lambda: strategy.run(lambda: model(row, training=True).logits), autograph=False)
    return {"dropped": np.stack([strategy.experimental_local_results(replicas()) for _ in range(2)])}


def refusals(run: Run) -> dict[str, str]:
    def of_outside():
        model, optimizer = run.model(), AdamW(RECIPE)
        model.compile(optimizer, jit_compile=False)
        run.fit(model)

    def of_plain():
        model = TFOPTForCausalLM.from_pretrained(run.folder / "model")
        with run.scope():
            Trainer(model, RECIPE)

    def of_accumulation():
        with run.scope():
            AdamW(RECIPE, gradient_accumulation_steps=2).build(run.model().trainable_variables)

    def of_xla():
        model = run.model()
        model.compile(make_optimizer(model, RECIPE), jit_compile=True)
        run.fit(model)

    def of_rows():
        Trainer(run.model(), RECIPE).step({name: x[:3] for name, x in batch_of().items()})

    def of_workers():
        with tf.distribute.MultiWorkerMirroredStrategy().scope():
            model = TFOPTForCausalLM.from_pretrained(run.folder / "model")
        Trainer(model, RECIPE)

    def of_fitted_workers():
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        Run(run.folder, strategy).fit(Run(run.folder, strategy).compiled())

    found = {}
    for case in (of_workers, of_fitted_workers, of_outside, of_plain, of_accumulation, of_xla, of_rows):
        try:
            case()
        except InputError as error:
            found[case.__name__] = str(error)
    return found


ALIKE = {
    "fit": fitted,
    "trainer": stepped,
    "trainer in parts": stepped_in_parts,
    "other heads": other_heads,
    "other losses": other_losses,
}
CASES = ALIKE | {"callbacks": callbacks, "replicas": outputs_in_training, "refused": refusals}

if __name__ == "__main__":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    run = Run(Path(sys.argv[1]), strategy)
    found = {f"{name}/{key}": np.asarray(x) for name in sys.argv[2:] for key, x in CASES[name](run).items()}
    np.savez(run.folder / "mirrored.npz", **found)
