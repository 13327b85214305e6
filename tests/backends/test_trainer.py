"""Steps of training against AdamW in float64, between the backends, and across an interruption and a change of
framework."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness import ROUNDOFF, config_of, mask_named, reference_of, save_random, token_ids

from conversion.training_state import read_training_state
from opt_core.errors import InputError, TrainingError
from opt_core.lora import LoraConfig, new_adapter
from opt_core.optimization import Moments, TrainingRecipe, adamw_step
from opt_core.reference import IGNORED_LABEL, causal_lm_loss, classification_loss, question_answering_loss
from opt_core.schema import shapes

ROOT = Path(__file__).parent.parent.parent

# The epsilon keeps gradients that are zero but for rounding, such as those of the keys' biases, from becoming steps.
RECIPE = TrainingRecipe(
    learning_rate=0.02, warmup_steps=3, total_steps=9, weight_decay=0.2, max_gradient_norm=0.7, epsilon=1e-3
)
STEPS = 5


def training_of(backend):
    return importlib.import_module(f"opt_{backend.name}.training")


def trainer_of(backend, config, recipe=RECIPE, *, seed: int = 0, accumulate: int = 1, task: str = "causal-lm"):
    """On random weights, which are the same for every backend."""
    model = backend.random_model(config, task)
    return training_of(backend).Trainer(model, recipe, seed=seed, accumulate=accumulate)


def batch_of(config, step: int, mask: str = "right") -> dict[str, np.ndarray]:
    ids = token_ids(config, seed=step)
    return dict(input_ids=ids, attention_mask=mask_named(mask), labels=ids)


def weights_of(backend, trainer) -> dict[str, np.ndarray]:
    names = shapes(trainer.model.config, trainer.model.task)
    return {name: backend.numpy(trainer.model.weight(name)).copy() for name in names}


def assert_close(got, truth, largest: float) -> None:
    """Each weight within `largest`, beside what rounding takes of it."""
    assert got.keys() == truth.keys()
    for name, want in truth.items():
        bound = largest + 8 * ROUNDOFF["float32"] * np.abs(want).max(initial=0)
        np.testing.assert_allclose(got[name], want, rtol=0, atol=bound, err_msg=name)


# -- the equations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["350m style"])
def test_steps_are_those_of_adamw_in_float64(backend, variant, tmp_path):
    """Gradients are taken beforehand, in float32, at the same weights; all else of the truth is float64."""
    config = config_of(variant, num_hidden_layers=1)
    trainer = trainer_of(backend, config)
    truth, moments, norms = weights_of(backend, trainer), None, []
    for step in range(STEPS):
        batch = batch_of(config, step)
        _, gradients = backend.loss_and_gradients(trainer.model, **batch)
        trainer.step(batch)
        truth, moments, norm = adamw_step(RECIPE, step, truth, gradients, moments)
        assert trainer.gradient_norm == pytest.approx(norm, rel=1e-5)
        assert_close(weights_of(backend, trainer), truth, largest=1e-4 * RECIPE.learning_rate)
        norms.append(norm)
    assert min(norms) > RECIPE.max_gradient_norm  # clipping was active
    trainer.save(tmp_path)
    saved = read_training_state(tmp_path, shapes(config))
    assert (saved.step, saved.recipe) == (STEPS, RECIPE)
    for kind in Moments._fields:
        got, want = ({name: getattr(pair, kind) for name, pair in of.items()} for of in (saved.moments, moments))
        assert_close(got, want, largest=1e-6)


def test_the_loss_of_a_step_is_that_of_the_reference_before_it(backend):
    config = config_of()
    trainer, batch = trainer_of(backend, config), batch_of(config, 0, "holes")
    reference = reference_of(config)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    truth = causal_lm_loss(reference.logits(reference(ids, mask).last_hidden_state), ids, mask)
    assert trainer.evaluate(batch) == pytest.approx(truth, rel=1e-6)
    assert trainer.step(batch) == pytest.approx(truth, rel=1e-6)
    assert trainer.evaluate(batch) < truth
    assert trainer.step_count == 1


def test_every_backend_takes_the_same_steps(backends):
    config = config_of("350m style")
    losses, after = {}, {}
    for backend in backends:
        trainer = trainer_of(backend, config)
        losses[backend.name] = [trainer.step(batch_of(config, step)) for step in range(STEPS)]
        after[backend.name] = weights_of(backend, trainer)
    first = backends[0].name
    assert np.ptp(losses[first]) > 0.1
    for name in losses:
        np.testing.assert_allclose(losses[name], losses[first], rtol=1e-5, err_msg=name)
        assert_close(after[name], after[first], largest=1e-3 * RECIPE.learning_rate)


def test_a_batch_in_parts_is_the_batch(backend):
    """Rows of different lengths: parts weigh as much as they have targets."""
    config = config_of(num_hidden_layers=1)
    whole, parts = (trainer_of(backend, config, accumulate=number) for number in (1, 2))
    for step in range(2):
        batch = batch_of(config, step)
        assert parts.step(batch) == pytest.approx(whole.step(batch), rel=1e-6)
        assert parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-5)
    assert_close(weights_of(backend, parts), weights_of(backend, whole), largest=1e-4 * RECIPE.learning_rate)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("sequence-classification", dict(labels=[IGNORED_LABEL, 1, 2, 0])),
        ("question-answering", dict(start_positions=[IGNORED_LABEL, 13, 0, 2], end_positions=[11, 3, 0, 5])),
    ],
    ids=["classes", "answers"],
)
def test_parts_weigh_what_they_count_whatever_the_task(backend, task, labels):
    """One row of the first part has no label; of its starts none counts (left out, beyond the text), of its ends one.

    The truth is the loss in float64, which knows of no parts.
    """
    config = config_of(num_hidden_layers=1, num_labels=3)
    labels = {name: np.array(x) for name, x in labels.items()}
    batch = dict(input_ids=token_ids(config), attention_mask=mask_named("right")) | labels
    truth = LOSSES[task](reference_of(config, task), **batch)
    whole, parts = (trainer_of(backend, config, accumulate=number, task=task) for number in (1, 2))
    assert whole.step(batch) == pytest.approx(truth, rel=1e-6)
    assert parts.step(batch) == pytest.approx(truth, rel=1e-6)
    assert parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-5)
    assert_close(weights_of(backend, parts), weights_of(backend, whole), largest=1e-4 * RECIPE.learning_rate)


def loss_of_classes(reference, input_ids, attention_mask, labels) -> float:
    logits_BK = reference.classify(reference(input_ids, attention_mask).last_hidden_state, attention_mask)
    return classification_loss(logits_BK, labels, "single_label_classification")


def loss_of_answers(reference, input_ids, attention_mask, start_positions, end_positions) -> float:
    spans = reference.answer_spans(reference(input_ids, attention_mask).last_hidden_state, attention_mask)
    return question_answering_loss(*spans, start_positions, end_positions, attention_mask)


LOSSES = {"sequence-classification": loss_of_classes, "question-answering": loss_of_answers}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_wrong_with_labels_is_said_before_the_step(backend, accumulate):
    config = config_of(num_hidden_layers=1, num_labels=3)
    ids, starts = token_ids(config), np.array([0, 1, -5, 2])
    for task, labels, problem in (
        ("causal-lm", {}, "labels: missing"),
        ("causal-lm", dict(labels=ids + 97), "labels: expected 0 to 96, or -100 to ignore, got"),
        ("sequence-classification", dict(labels=np.array([0, 1, 2, 3])), "labels: expected 0 to 2, .* got 3"),
        ("question-answering", {}, "start_positions, end_positions: missing"),
        ("question-answering", dict(start_positions=starts, end_positions=starts), "start_positions: .* got -5"),
    ):
        trainer = trainer_of(backend, config, accumulate=accumulate, task=task)
        for call in (trainer.step, trainer.evaluate):
            with pytest.raises(InputError, match=problem):
                call(dict(input_ids=ids, **labels))
        assert trainer.step_count == 0


@pytest.mark.parametrize("accumulate", [0, -1, 1.5, True])
def test_a_batch_is_cut_into_one_part_at_least(backend, accumulate):
    with pytest.raises(InputError, match=r"accumulate: expected an integer of at least 1"):
        training_of(backend).Trainer(None, accumulate=accumulate)


def test_a_loss_that_is_not_finite_stops_the_step_and_changes_nothing(backend):
    config = config_of(num_hidden_layers=1)
    trainer, batch = trainer_of(backend, config), batch_of(config, 0)
    trainer.step(batch)
    before, loss = weights_of(backend, trainer), trainer.evaluate(batch)
    spoilt = np.full((*batch["input_ids"].shape, config.word_embed_proj_dim), np.nan, np.float32)
    with pytest.raises(TrainingError, match=r"^step 1: "):
        trainer.step(dict(inputs_embeds=spoilt, labels=batch["labels"]))
    assert trainer.step_count == 1
    assert all(np.array_equal(before[name], after) for name, after in weights_of(backend, trainer).items())
    assert trainer.step(batch) == pytest.approx(loss, rel=1e-6)
    assert all(np.isfinite(after).all() for after in weights_of(backend, trainer).values())


# -- interrupted ------------------------------------------------------------------------------------------------------

DROPOUT = dict(dropout=0.2, attention_dropout=0.1, layerdrop=0.2)


def test_a_run_that_was_saved_goes_on_bit_for_bit(backend, tmp_path):
    """With dropout and LayerDrop, in a model and a Trainer made anew, of another seed."""
    config = config_of(**DROPOUT)
    unbroken = trainer_of(backend, config, seed=11)
    losses = [unbroken.step(batch_of(config, step)) for step in range(STEPS)]
    first, second = trainer_of(backend, config, seed=11), trainer_of(backend, config, seed=3)
    for step in range(2):
        first.step(batch_of(config, step))
    first.save(tmp_path)
    second.restore(tmp_path)
    assert second.step_count == 2
    assert [second.step(batch_of(config, step)) for step in range(2, STEPS)] == losses[2:]
    want = weights_of(backend, unbroken)
    assert all(np.array_equal(got, want[name]) for name, got in weights_of(backend, second).items())


def test_dropout_depends_on_the_seed_and_the_step(backend):
    config = config_of(dropout=0.2, num_hidden_layers=1)
    batch, still = batch_of(config, 0), TrainingRecipe(learning_rate=0.0)
    first, again, other = (trainer_of(backend, config, still, seed=seed) for seed in (1, 1, 2))
    losses = [first.step(batch) for _ in range(3)]
    assert [again.step(batch) for _ in range(3)] == losses
    assert len({*losses, other.step(batch)}) == 4


def test_a_run_goes_on_in_any_other_framework(backends, tmp_path):
    config = config_of("350m style")
    for backend in backends:
        trainer = trainer_of(backend, config)
        for step in range(2):
            trainer.step(batch_of(config, step))
        trainer.save(tmp_path / backend.name)
    losses, after = {}, {}
    for source in backends:
        for target in backends:
            trainer = trainer_of(target, config.replace())
            trainer.restore(tmp_path / source.name)
            losses[source, target] = [trainer.step(batch_of(config, step)) for step in range(2, STEPS)]
            after[source, target] = weights_of(target, trainer)
    first = backends[0], backends[0]
    for pair in losses:
        np.testing.assert_allclose(losses[pair], losses[first], rtol=1e-5, err_msg=str(pair))
        assert_close(after[pair], after[first], largest=1e-3 * RECIPE.learning_rate)


@pytest.mark.slow
def test_a_run_of_an_adapter_goes_on_in_any_other_framework(backends, tmp_path):
    config, lora = config_of(), LoraConfig(r=3, target_modules=("fc1", "q_proj"), task="causal-lm")
    names = new_adapter(config, lora)

    def trainer_with_adapter(backend, seed):
        trainer = trainer_of(backend, config)
        importlib.import_module(f"opt_{backend.name}.lora").add_lora(trainer.model, lora, seed)
        return training_of(backend).Trainer(trainer.model, RECIPE)

    losses = {}
    for backend in backends:
        trainer = trainer_with_adapter(backend, 5)
        for step in range(2):
            trainer.step(batch_of(config, step))
        trainer.save(tmp_path / backend.name)
        saved = read_training_state(tmp_path / backend.name).moments
        assert set(saved) == {f"{module}.lora_{letter}.weight" for module in names for letter in "AB"}
    for source in backends:
        for target in backends:
            trainer = trainer_with_adapter(target, 7)
            trainer.restore(tmp_path / source.name)
            losses[source, target] = [trainer.step(batch_of(config, step)) for step in range(2, STEPS)]
    first = losses[backends[0], backends[0]]
    assert all(np.allclose(other, first, rtol=1e-5) for other in losses.values())


# -- killed -----------------------------------------------------------------------------------------------------------

WORKER = """
import importlib, sys
import numpy as np
from opt_core.batching import Batches
from opt_core.optimization import TrainingRecipe
from opt_zoo.training_loop import train

name, weights, folder = sys.argv[1:]
prefix = {"torch": "", "tf": "TF", "flax": "Flax"}[name]
model = getattr(importlib.import_module(f"opt_{name}"), f"{prefix}OPTForCausalLM").from_pretrained(weights)
ids = np.random.default_rng(0).integers(4, 97, (24, 13))
examples = [{"input_ids": row, "labels": row} for row in ids]
recipe = TrainingRecipe(learning_rate=0.01, warmup_steps=3, total_steps=12)
trainer = importlib.import_module(f"opt_{name}.training").Trainer(model, recipe, seed=5)
train(trainer, Batches(examples, 4, seed=2), 12, folder, save_every=2, keep=3)
"""


def start(backend, weights, folder) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, backend.name, str(weights), str(folder)], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def losses_of(folder) -> dict[int, float]:
    lines = (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["step"]: line["loss"] for line in whole if "loss" in line}


def kill_when(process, reached) -> None:
    """SIGKILL as soon as `reached()`; the process must not have ended before."""
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_losses_of_an_unbroken_one(backend, tmp_path):
    """Killed in the middle of training, then in the middle of saving, then left alone."""
    config = config_of(**DROPOUT)
    weights, unbroken, broken = save_random(tmp_path / "weights", config), tmp_path / "unbroken", tmp_path / "broken"
    assert start(backend, weights, unbroken).wait() == 0
    kill_when(start(backend, weights, broken), lambda: max(losses_of(broken), default=0) >= 4)
    assert max(losses_of(broken)) < 11
    kill_when(start(backend, weights, broken), lambda: any(broken.glob("step-*8.tmp")))
    process = start(backend, weights, broken)
    assert process.wait() == 0, process.stderr.read().decode()
    assert losses_of(broken) == losses_of(unbroken)
    assert len(losses_of(broken)) == 12
    of_both = [(folder / "step-000012" / "model.safetensors").read_bytes() for folder in (broken, unbroken)]
    assert of_both[0] == of_both[1]
